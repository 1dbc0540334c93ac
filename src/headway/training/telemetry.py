"""What a step cost and where the run stands: operations, memory, shares of the sources."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from headway.data.packing import Rows
from headway.training.config import TrainConfig
from headway.training.data_mix import DataMix, SourceShare
from headway.training.flops import training_flops_per_token
from headway.training.model_building import fresh_model, multi_token_config
from headway.training.peak import peak_flops_per_second

_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class StepCost:
    """What `StepDone` tells of a logged step beside the loss; see there."""

    flops: int | None
    mfu: float | None
    resident_bytes: int | None
    gpu_peak_bytes: int | None
    data_mix: tuple[SourceShare, ...] | None


class Telemetry:
    """Counts operations and watches memory of one process.

    Args:
        config: of the run.
        shape: of the model, from `base_config`.
        rows: of the run.
        device: of this process.
    """

    def __init__(self, config: TrainConfig, shape: Any, *, rows: Rows, device: torch.device) -> None:
        self.flops_per_token = count_flops(config, shape)
        self.peak_flops_per_second: float | None = None
        if self.flops_per_token is not None:
            one = peak_flops_per_second(config.mfu_peak, device=device, precision=config.precision)
            self.peak_flops_per_second = None if one is None else one * _processes()
        self._device, self._mix = device, DataMix(rows)

    def flops(self, tokens: int) -> int | None:
        """Floating-point operations of the model for so many training tokens; None for a model that cannot be counted."""
        return None if self.flops_per_token is None else tokens * self.flops_per_token

    def cost(self, *, tokens: int, rows: int, tokens_per_second: float) -> StepCost:
        """Figures after so many tokens and rows of all processes together, at that speed of all of them together."""
        mfu = None
        if self.flops_per_token is not None and self.peak_flops_per_second is not None:
            mfu = tokens_per_second * self.flops_per_token / self.peak_flops_per_second
        on_gpu = self._device.type == "cuda"
        return StepCost(
            flops=self.flops(tokens),
            mfu=mfu,
            resident_bytes=resident_bytes(),
            gpu_peak_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            data_mix=self._mix.shares(rows),
        )


_counted: dict[str, int | None] = {}


def count_flops(config: TrainConfig, shape: Any) -> int | None:
    """Operations per token of the model that a configuration describes, teachers and soft targets aside.

    None where the forward depends on data.
    """
    built = (config.shorten_trunk, config.init_from is None, config.sequence_length)
    key = f"{shape.to_json_string(use_diff=False)} {multi_token_config(config)} {built}"
    if key not in _counted:
        _counted[key] = _count(config, shape)
    return _counted[key]


def _count(config: TrainConfig, shape: Any) -> int | None:
    with torch.device("meta"):
        model = fresh_model(config, shape)
    try:
        return training_flops_per_token(model, sequence_length=config.sequence_length)
    except Exception:  # a family whose forward reads values (experts are chosen by them) cannot run without any
        return None


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where the system does not say."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
