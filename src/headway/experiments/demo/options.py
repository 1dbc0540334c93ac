"""What a demo does: the few things a caller chooses, and two sizes of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headway.errors import ConfigError
from headway.training.config import TrainConfig
from headway.training.config_file import resolve_config

RECIPE = "demo-bytes"

DEFAULT_OUTPUT = Path("out/demo")
DEFAULT_QUICK_OUTPUT = Path("out/demo-quick")


@dataclass(frozen=True)
class DemoScale:
    """How much of everything.

    Attributes:
        prompts: held-out prompts that are decoded.
        prompt_bytes: length of each.
        new_bytes: bytes written after each, both ways.
        evaluation_bytes: held-out bytes for likelihood and loop-free acceptance.
        speed_new_bytes: bytes per prompt and arm in the speed measurement.
        speed_repeats: timed rounds of it.
        replay_seconds: length of the replay in a terminal, all prompts together.
        recipe_overrides: options laid over the recipe.
    """

    prompts: int
    prompt_bytes: int
    new_bytes: int
    evaluation_bytes: int
    speed_new_bytes: int
    speed_repeats: int
    replay_seconds: float
    recipe_overrides: Mapping[str, Any]


FULL = DemoScale(
    prompts=4,
    prompt_bytes=96,
    new_bytes=256,
    evaluation_bytes=65_536,
    speed_new_bytes=128,
    speed_repeats=5,
    replay_seconds=9.0,
    recipe_overrides={},
)

QUICK = DemoScale(
    prompts=2,
    prompt_bytes=32,
    new_bytes=48,
    evaluation_bytes=4096,
    speed_new_bytes=16,
    speed_repeats=3,
    replay_seconds=1.5,
    recipe_overrides={
        "hidden_size": 32,
        "num_layers": 5,
        "num_heads": 2,
        "sequence_length": 64,
        "batch_size": 8,
        "steps": 20,
        "log_every_steps": 2,
        "precision": "float32",
        "compile": "off",
    },
)
"""For a look at what the demo shows, and for tests: seconds, and a model that has learned nearly nothing."""


@dataclass(frozen=True)
class DemoOptions:
    """What the caller chooses.

    Attributes:
        output: the demo's folder; None for the default of its size.
        overwrite: whether an earlier demo in a folder that the caller named may be deleted.
        steps: optimizer steps; None for the recipe's.
        quick: seconds instead of minutes, to see what the demo shows.
        seed: of initial weights and data order.
        threads: CPU threads of one operation; None for torch's choice.
    """

    output: Path | None = None
    overwrite: bool = False
    steps: int | None = None
    quick: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}: got {value}; raise it or leave it out")

    @property
    def scale(self) -> DemoScale:
        """How much of everything."""
        return QUICK if self.quick else FULL

    @property
    def folder(self) -> Path:
        """Where the demo goes."""
        return self.output or (DEFAULT_QUICK_OUTPUT if self.quick else DEFAULT_OUTPUT)

    @property
    def may_replace_demo(self) -> bool:
        """Whether an earlier demo in the folder may go: always in the demo's own folder, elsewhere when allowed."""
        return self.overwrite or self.output is None

    def training_config(self) -> TrainConfig:
        """The recipe with this demo's options laid over it; the run goes into the demo's folder."""
        overrides: dict[str, Any] = {
            **self.scale.recipe_overrides,
            "output": str(self.folder / "training"),
            "seed": self.seed,
            "threads": self.threads,
            # The demo measures more, at its end, than an evaluation would; and it is not resumed.
            "eval_every_steps": None,
            "checkpoint_every_steps": None,
            "keep_checkpoints": 1,
            "tensorboard": False,
        }
        if self.steps is not None:
            overrides["steps"] = self.steps
        config = resolve_config(recipe=RECIPE, overrides=overrides)
        if config.precision != "float32" and not has_fast_bfloat16():
            return resolve_config(recipe=RECIPE, overrides={**overrides, "precision": "float32"})
        return config


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones here: where the hardware has them."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
