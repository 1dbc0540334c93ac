"""Moments of the optimizer on disk: one safetensors file of one process, or shards of many.

    optimizer.safetensors     moments by parameter name, where every process has all of them
    optimizer/                `torch.distributed.checkpoint`: each process writes what it has, as FSDP2 shards it

Either can be read by any number of processes in any of the ways of `headway.training.parallel`. The index of the shards is a
pickle, as torch writes it: a run's resume checkpoints are its own, and their files are compared with the manifest before
anything is opened. Weights are not here but in the plain model beside it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from headway.training.optimizers import TrainingOptimizer
from headway.training.parallel import Parallel

WHOLE_FILE, SHARDS = "optimizer.safetensors", "optimizer"


def write_moments(folder: Path, optimizer: TrainingOptimizer, parallel: Parallel) -> None:
    """Write the optimizer's state; all processes call this, and return when all have written.

    Args:
        folder: of the checkpoint, there already.
        optimizer: whose state it is.
        parallel: whether it is sharded.

    Raises:
        OSError: the disk refuses.
    """
    tensors = optimizer.state_tensors()
    if parallel.mode == "fsdp":
        with _system_errors(), _quiet():
            save(tensors, checkpoint_id=folder / SHARDS)
    elif parallel.processes.is_main:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WHOLE_FILE)


def read_moments(folder: Path, optimizer: TrainingOptimizer, parallel: Parallel) -> None:
    """Put back what `write_moments` wrote, cut anew where the processes are others; all processes call this.

    Raises:
        CheckpointError: moments of other parameters.
        OSError: they cannot be read.
    """
    parameters = optimizer.named_parameters
    if (folder / WHOLE_FILE).exists():
        tensors = load_file(folder / WHOLE_FILE)
        if parallel.mode == "fsdp":
            tensors = {name: _cut(name, tensor, parameters) for name, tensor in tensors.items()}
    else:
        tensors = _read_shards(folder / SHARDS, parameters, sharded=parallel.mode == "fsdp")
    optimizer.load_state_tensors(tensors)


def _read_shards(folder: Path, parameters: Mapping[str, Tensor], *, sharded: bool) -> dict[str, Tensor]:
    with _system_errors(), _quiet():
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for name, entry in stored.items():
            assert isinstance(entry, TensorStorageMetadata), "only tensors are written"
            parameter = parameters.get(name.partition("/")[2])
            if sharded and parameter is not None and entry.size == parameter.shape:
                tensors[name] = torch.zeros_like(parameter, dtype=entry.properties.dtype)
            else:
                tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
        # Whole tensors each process reads for itself; shards they read together.
        load(tensors, checkpoint_id=folder, no_dist=not sharded)
    return tensors


def _cut(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """A moment in the shards of its parameter; every process has the whole of it."""
    parameter = parameters.get(name.partition("/")[2])
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


@contextmanager
def _system_errors() -> Iterator[None]:
    """What the file system said, out of torch's own error, which is no Exception and holds one per rank."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own interfaces, which would stand on the screen at every checkpoint."""
    logger: Any = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
