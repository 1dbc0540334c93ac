"""A tiny corpus and the configuration of a run of seconds on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import run_fields, write_corpus

from headway.training.config import TrainConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the configuration of a run of a few steps; keyword arguments override its fields."""

    def make(output: str = "run", **overrides: Any) -> TrainConfig:
        return TrainConfig(**run_fields(corpus, tmp_path / output, **overrides))

    return make
