"""A tiny corpus and the configuration of a run of seconds on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headway.training.config import TrainConfig

WORDS = ["trunk", "head", "token", "offset", "draft", "block", "accept", "cache", "row", "step", "loss", "mean"]


def write_corpus(folder: Path) -> Path:
    """Six small texts in six groups, short enough that packed rows hold several documents."""
    draw = random.Random(7)
    for group in range(6):
        (folder / f"package{group}").mkdir(parents=True)
        for number in range(4):
            text = " ".join(draw.choice(WORDS) for _ in range(30 + 10 * number))
            (folder / f"package{group}" / f"text{number}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the configuration of a run of a few steps; keyword arguments override its fields."""

    def make(**overrides: Any) -> TrainConfig:
        fields: dict[str, Any] = {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 2,
            "num_future_tokens": 3,
            "data": (str(corpus),),
            "held_out_fraction": 0.2,
            "sequence_length": 48,
            "batch_size": 2,
            "steps": 6,
            "learning_rate": 3e-3,
            "eval_every_steps": None,
            "checkpoint_every_steps": 2,
            "log_every_steps": 1,
            "tensorboard": False,
            "output": str(tmp_path / "run"),
        }
        return TrainConfig(**(fields | overrides))

    return make
