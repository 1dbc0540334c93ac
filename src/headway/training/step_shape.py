"""How the rows of an optimizer step are cut into processes and micro-batches.

`batch_size` and `gradient_accumulation_steps` are those of one process; a step has their product times the processes. What
a run is, is the rows of its steps: resumed on another number of processes it keeps them, and accumulates more or less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headway.errors import ConfigError
from headway.training.config import TrainConfig

_CUT = ("batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class StepShape:
    """One optimizer step's rows.

    Attributes:
        batch_size: rows of a micro-batch.
        micro_batches: of each process.
        processes: that share the step.
        sequence_length: tokens of a row.
    """

    batch_size: int
    micro_batches: int
    processes: int
    sequence_length: int

    @property
    def rows_per_process(self) -> int:
        """That each process takes of a step."""
        return self.batch_size * self.micro_batches

    @property
    def rows(self) -> int:
        """Of all processes together."""
        return self.rows_per_process * self.processes

    @property
    def tokens(self) -> int:
        """Input tokens of all processes together."""
        return self.rows * self.sequence_length

    def to_json(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"rows": self.rows, "processes": self.processes, "micro_batches": self.micro_batches}


def step_shape(config: TrainConfig, *, processes: int) -> StepShape:
    """As the configuration says it."""
    return StepShape(config.batch_size, config.gradient_accumulation_steps, processes, config.sequence_length)


def resumed_shape(
    config: TrainConfig, *, processes: int, saved_config: Mapping[str, Any], saved_step: Mapping[str, int]
) -> tuple[StepShape, str | None]:
    """The cut that keeps the rows of a checkpoint's steps, and a sentence where that takes another accumulation.

    Where batch_size or gradient_accumulation_steps were changed on purpose, the configuration is taken at its word.

    Args:
        config: of the run now.
        processes: that it has now.
        saved_config: of the checkpoint.
        saved_step: what `StepShape.to_json` gave when it was written.

    Raises:
        ConfigError: these processes cannot share the rows in micro-batches of batch_size.
    """
    asked = step_shape(config, processes=processes)
    if any(saved_config.get(name) != getattr(config, name) for name in _CUT) or saved_step["rows"] == asked.rows:
        return asked, None
    rows = saved_step["rows"]
    if rows % (config.batch_size * processes):
        raise ConfigError(
            f"the steps of this run have {rows} rows, which {processes} processes cannot share in micro-batches of "
            f"batch_size={config.batch_size}: got {saved_step['processes']} processes before; set batch_size and "
            f"gradient_accumulation_steps so that their product times {processes} is {rows}, or start as many processes as "
            f"before"
        )
    kept = StepShape(config.batch_size, rows // (config.batch_size * processes), processes, config.sequence_length)
    return kept, (
        f"this run had {saved_step['processes']} processes and now has {processes}: gradient_accumulation_steps is "
        f"{kept.micro_batches} instead of {saved_step['micro_batches']}, so that a step keeps its {rows} rows"
    )


def alone(saved_config: Mapping[str, Any]) -> dict[str, int]:
    """What `StepShape.to_json` would have given for a checkpoint of one process that did not keep it."""
    micro_batches = int(saved_config["gradient_accumulation_steps"])
    return {"rows": int(saved_config["batch_size"]) * micro_batches, "processes": 1, "micro_batches": micro_batches}
