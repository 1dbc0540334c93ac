"""Joining the processes that `torchrun` started, and the device of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from headway.errors import ConfigError
from headway.processes import Processes, process_group_of_all
from headway.training.interruption import TrainingInterruptedError


def started_processes() -> int:
    """How many processes `torchrun` started; 1 without it. Reads the environment only, joins nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that `torchrun` started, or those of a default process group that is there already.

    Gradients travel over NCCL where they are on CUDA, over gloo where they are on the CPU; what the processes have to
    agree on travels over gloo, so that no agreement waits for a GPU.

    Args:
        device: auto, cpu, cuda or cuda:N; on several processes each takes the device of its number on its machine.

    Yields:
        The processes, and the device of this one.

    Raises:
        ConfigError: a device that is not there, or one device for several processes.
    """
    there_already = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if there_already else started_processes()
    if count == 1:
        yield Processes(), _device(device)
        return
    rank = dist.get_rank() if there_already else int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    chosen = _device_of_local_rank(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not there_already:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    ended_together = chosen.type == "cpu"
    try:
        with process_group_of_all(local_rank=local_rank) as processes:
            yield processes, chosen
        ended_together = True
    except TrainingInterruptedError:
        ended_together = True
        raise
    finally:
        # NCCL waits for the others when a group ends. After an error that they may not have met they do not come, and the
        # end of this process is the end of the group.
        if ended_together and not there_already:
            dist.destroy_process_group()


def _device_of_local_rank(device: str, local_rank: int) -> torch.device:
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device={device} names one device for several processes; pass --device cuda, so that each process takes its "
            f"own"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if device in ("auto", "cuda") and local_rank >= found:
        raise ConfigError(
            f"device={device}: process {local_rank} of this machine finds {found} CUDA devices; start at most one process "
            f"per device (torchrun --nproc-per-node {max(found, 1)}), or pass --device cpu"
        )
    return _device(f"cuda:{local_rank}" if device in ("auto", "cuda") else device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is none that torch knows; pass auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device={name} is not there: torch sees {torch.cuda.device_count()} CUDA devices; pass --device cpu"
        )
    return device
