"""A tiny corpus and the configuration of a run of seconds on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from headway.training.config import TrainConfig
from small_runs import run_fields, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the configuration of a run of a few steps; keyword arguments override its fields."""

    def make(output: str = "run", **overrides: Any) -> TrainConfig:
        return TrainConfig(**run_fields(corpus, tmp_path / output, **overrides))

    return make


@pytest.fixture
def with_dropout(tmp_path: Path) -> dict[str, Any]:
    """Fields of a run whose forward draws random numbers: its micro-batches only repeat where the state does."""
    shape = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        attention_dropout=0.3,
    )
    shape.save_pretrained(tmp_path / "shape")
    return {
        "base_config": str(tmp_path / "shape"),
        "hidden_size": None,
        "num_layers": None,
        "num_heads": None,
        "gradient_accumulation_steps": 2,
    }
