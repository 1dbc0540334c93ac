"""What a comparison of heads does: the few things a caller chooses, and two sizes of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.errors import ConfigError
from headway.experiments.heads.variants import HeadVariant, chosen_variants
from headway.training.config import TrainConfig
from headway.training.config_file import resolve_config
from headway.training.fields import field_specs

RECIPE = "demo-bytes"
"""Optimizer settings of the runs."""

DEFAULT_OUTPUT = Path("out/heads")
DEFAULT_SMOKE_OUTPUT = Path("out/heads-smoke")
TOKENS, RUNS = "tokens", "runs"

_NO_DEFAULT = object()
_SHOWN = (
    "data",
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "sequence_length",
    "hidden_size",
    "num_layers",
    "shorten_trunk",
)
"""Fields that the report tells whatever they are."""


@dataclass(frozen=True)
class HeadsScale:
    """How much of everything.

    Attributes:
        fields: options of every run, laid over the recipe.
        held_out_rows: held-out rows of the training length for likelihood and loop-free acceptance.
        block_prompts: held-out prompts whose first block counts as loop-free acceptance of the real decoder.
        block_prompt_tokens: length of each.
        prompts: held-out prompts that are decoded, for equality and for the check of caches.
        prompt_tokens: length of each.
        new_tokens: decoded after each.
        cache_texts: held-out rows that the check of caches follows.
        cache_prompt_tokens: of each, what is the prompt.
        cache_blocks: forward passes of the check of caches.
        speed_prompts: prompts of the speed measurement.
        speed_new_tokens: decoded after each of them.
        speed_repeats: timed rounds.
        training_repeats: timed rounds of training steps.
        context_tokens: context for which the bytes of a step are counted.
    """

    fields: Mapping[str, Any]
    held_out_rows: int
    block_prompts: int
    block_prompt_tokens: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    cache_texts: int
    cache_prompt_tokens: int
    cache_blocks: int
    speed_prompts: int
    speed_new_tokens: int
    speed_repeats: int
    training_repeats: int
    context_tokens: int


FULL = HeadsScale(
    fields={
        "hidden_size": 96,
        "num_layers": 8,
        "num_heads": 2,
        "num_future_tokens": 4,
        "sequence_length": 256,
        "batch_size": 4,
        "steps": 300,
        "checkpoint_every_steps": 100,
    },
    held_out_rows=64,
    block_prompts=1024,
    block_prompt_tokens=64,
    prompts=8,
    prompt_tokens=64,
    new_tokens=64,
    cache_texts=6,
    cache_prompt_tokens=64,
    cache_blocks=16,
    speed_prompts=2,
    speed_new_tokens=64,
    speed_repeats=7,
    training_repeats=9,
    context_tokens=256,
)

SMOKE = HeadsScale(
    fields={
        "hidden_size": 16,
        "num_layers": 5,
        "num_heads": 2,
        "num_future_tokens": 3,
        "sequence_length": 32,
        "batch_size": 2,
        "steps": 3,
        "checkpoint_every_steps": None,
    },
    held_out_rows=2,
    block_prompts=6,
    block_prompt_tokens=16,
    prompts=2,
    prompt_tokens=16,
    new_tokens=8,
    cache_texts=2,
    cache_prompt_tokens=16,
    cache_blocks=3,
    speed_prompts=1,
    speed_new_tokens=4,
    speed_repeats=1,
    training_repeats=1,
    context_tokens=16,
)
"""For a look at what the comparison does, and for tests: nothing is learned."""


@dataclass(frozen=True)
class HeadsOptions:
    """What the caller chooses.

    Attributes:
        output: folder of the comparison; None for the default of its size.
        variants: names of the variants; all where empty.
        seeds: of initial weights and data order; one run of every variant for each.
        steps: optimizer steps of every run; None for those of the scale.
        on_top: put the decoder layers of heads on top of all layers, instead of taking them from the trunk.
        data: sources of text, as `headway train --data` takes them; None for the standard library.
        smoke: seconds, and nothing learned.
        threads: CPU threads of one operation; None for torch's choice.
        overwrite: whether an earlier comparison in the folder may be deleted.
    """

    output: Path | None = None
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    on_top: bool = False
    data: tuple[str, ...] | None = None
    smoke: bool = False
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        chosen_variants(self.variants)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different numbers >= 0, at least one: got {list(self.seeds)}")
        for name in ("steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1: got {value}; raise it or leave it out")

    @property
    def scale(self) -> HeadsScale:
        """How much of everything."""
        return SMOKE if self.smoke else FULL

    @property
    def folder(self) -> Path:
        """Where the comparison goes."""
        return self.output or (DEFAULT_SMOKE_OUTPUT if self.smoke else DEFAULT_OUTPUT)

    @property
    def chosen(self) -> tuple[HeadVariant, ...]:
        """The variants, in the order of the tables."""
        return chosen_variants(self.variants)

    def run_folder(self, variant: HeadVariant, seed: int) -> Path:
        """Where one run goes."""
        return self.folder / RUNS / variant.name / f"seed-{seed}"

    def training_config(self, variant: HeadVariant, seed: int) -> TrainConfig:
        """The configuration of one run; but for the heads and the seed it is that of all others."""
        fields: dict[str, Any] = {
            **self.scale.fields,
            "precision": "float32",
            "compile": "off",
            "eval_every_steps": None,
            "keep_checkpoints": 1,
            "tensorboard": False,
            "shorten_trunk": not self.on_top,
            **variant.fields,
            "seed": seed,
            "threads": self.threads,
            "cache_directory": str(self.folder / TOKENS),
            "output": str(self.run_folder(variant, seed)),
        }
        if self.steps is not None:
            fields |= {"steps": self.steps}
        if self.data is not None:
            fields |= {"data": list(self.data)}
        return resolve_config(recipe=RECIPE, overrides=fields)

    def training_settings(self) -> dict[str, Any]:
        """What must be the same for runs to share a folder, JSON-ready; variants and seeds may be added."""
        shared = self.training_config(chosen_variants(())[0], seed=0).to_dict()
        own = ("seed", "output", "cache_directory", "threads", "num_future_tokens")
        # Without fields that have their defaults, so that a later headway with more fields may go on.
        defaults = {name: spec.default for name, spec in field_specs(TrainConfig).items() if name not in _SHOWN}
        training = {
            name: value
            for name, value in shared.items()
            if name not in own and value != _listed(defaults.get(name, _NO_DEFAULT))
        }
        return training | {"num_future_tokens": self.scale.fields["num_future_tokens"]}

    def evaluation_settings(self) -> dict[str, Any]:
        """What figures depend on beside the runs; where it changes, runs are measured again, not trained again."""
        return {name: value for name, value in vars(self.scale).items() if name != "fields"}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
