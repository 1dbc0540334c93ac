"""Running out of memory, told as what a person can change instead of as an allocator's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from headway.errors import HeadwayError, TrainingError
from headway.training.config import TrainConfig
from headway.training.estimate import plan_training

_GIB = 2**30
# What torch's CPU allocator says inside a plain RuntimeError.
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextmanager
def out_of_memory_explained(config: TrainConfig, doing: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed inside the block into one sentence with the options that help.

    Args:
        config: of the run.
        doing: what the process was about, asked when it failed ("step 12").

    Raises:
        TrainingError: in the place of the allocator's error; what was saved before is as it was.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_advice(config, doing(), error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, HeadwayError):
        return False
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


def _advice(config: TrainConfig, doing: str, error: BaseException) -> str:
    first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
    ways = [f"halve batch_size={config.batch_size} and double gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} (the same training)"] if config.batch_size > 1 else []  # fmt: skip
    if not config.gradient_checkpointing:
        ways.append("pass --gradient-checkpointing")
    ways.append(f"lower loss_chunk_tokens={config.loss_chunk_tokens}")
    if "evaluation" in doing:
        ways = [f"lower eval_rows={config.eval_rows}, eval_prompts={config.eval_prompts}", *ways[-1:]]
    return (
        f"out of memory in {doing} ({first_line.strip()[:160]}); {_estimated(config)}"
        f"{', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}, then start the same command again: it goes "
        f"on from the last checkpoint"
    )


def _estimated(config: TrainConfig) -> str:
    try:
        memory = plan_training(config).memory
    except (MemoryError, RuntimeError, HeadwayError):
        # Nothing left to plan with; `headway train --dry-run` plans on a machine that has it.
        return "headway train --dry-run shows what a step takes; "
    return (
        f"a step takes about {memory.total / _GIB:.1f} GiB, {(memory.activations + memory.loss) / _GIB:.1f} of them for "
        f"activations and logits; "
    )
