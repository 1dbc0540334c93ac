"""Steps of a tiny model on two processes beside the same steps on one, for `tests/training/test_parallel.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from headway.data.loader import Batch
from headway.processes import Processes, process_group_of_all
from headway.training.config import TrainConfig
from headway.training.muon import orthogonalize_all
from headway.training.muon_sharing import ReplicatedSharing, ShardedSharing
from headway.training.optimizers import TrainingOptimizer
from headway.training.parallel import Parallel, parallelize
from headway.training.step import optimizer_step
from small_runs import tiny_model

STEPS, ROWS, LENGTH = 3, 8, 12


@dataclass(frozen=True)
class Case:
    """One setting in which two processes must do what one does."""

    mode: Any
    tied: bool = False
    optimizer: Any = "adamw"
    micro_batches: int = 1
    precision: Any = "float32"
    checkpointing: bool = False
    double: bool = False
    clip: float | None = 0.5

    @property
    def name(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name, None))


_SETTINGS = [
    {},
    {"double": True},
    {"double": True, "tied": True, "micro_batches": 2},
    {"tied": True, "clip": None},
    {"micro_batches": 4, "checkpointing": True},
    {"optimizer": "muon"},
    {"optimizer": "muon", "tied": True, "micro_batches": 2},
    {"precision": "bfloat16", "micro_batches": 2},
    {"precision": "bfloat16-residual", "tied": True, "checkpointing": True},
]
CASES = [Case(mode=mode, **setting) for mode in ("ddp", "fsdp") for setting in _SETTINGS]


def compare(rank: int, folder: str) -> None:
    """Write, per case, how far losses, gradient norms and weights are from those of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    with process_group_of_all(local_rank=rank) as processes:
        for case in CASES:
            alone = _steps(replace(case, mode="none"), Processes())
            together = _steps(case, processes)
            found[case.name] = {name: _gap(together[name], alone[name]) for name in alone}
        found |= {f"muon sharing {mode}": {"largest": gap} for mode, gap in _sharing_gaps(rank).items()}
    if rank == 0:
        Path(folder, "gaps.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _sharing_gaps(rank: int) -> dict[str, float]:
    """How far matrices of awkward shapes, given to their owners, are from those orthogonalised one process alone."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (5, 7), (1, 8), (6, 4), (9, 3), (3, 3), (2, 2)]
    updates = [torch.randn(shape, generator=draw) for shape in shapes]
    expected = [orthogonalize_all([update])[0] for update in updates]
    group = dist.group.WORLD
    assert group is not None
    mesh = init_device_mesh("cpu", (2,))
    shards = [distribute_tensor(update, mesh, [Shard(0)]) for update in updates]

    def one_by_one(matrices: list[Tensor]) -> list[Tensor]:
        return [orthogonalize_all([matrix])[0] for matrix in matrices]

    whole = ReplicatedSharing(group)(updates, one_by_one)
    rows = ShardedSharing(group)(shards, one_by_one)
    own = [distribute_tensor(matrix, mesh, [Shard(0)]).to_local() for matrix in expected]
    return {"ddp": _largest_gap(whole, expected), "fsdp": _largest_gap(rows, own)}


def _largest_gap(mine: list[Tensor], wanted: list[Tensor]) -> float:
    return max(
        float((ours.float() - theirs.float()).abs().max()) if theirs.numel() else 0.0
        for ours, theirs in zip(mine, wanted, strict=True)
    )


def _steps(case: Case, processes: Processes) -> dict[str, Tensor]:
    model = tiny_model(tied=case.tied).train()
    if case.double:
        model.double()
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    parallel = parallelize(model, case.mode, processes, torch.device("cpu"), heads_may_rest=False)
    config = TrainConfig(hidden_size=8, num_layers=4, num_heads=2, optimizer=case.optimizer, learning_rate=1e-2)
    optimizer = TrainingOptimizer(model, config, sharing=parallel.sharing)
    outcomes = [_step(parallel, optimizer, case, step) for step in range(STEPS)]
    weights = parallel.whole_state()
    return {
        "loss": torch.tensor([outcome.loss for outcome in outcomes], dtype=torch.float64),
        "loss_per_offset": torch.tensor([outcome.loss_per_offset for outcome in outcomes], dtype=torch.float64),
        "gradient_norm": torch.tensor([outcome.gradient_norm for outcome in outcomes], dtype=torch.float64),
        "weights": torch.cat([weights[name].double().flatten() for name in sorted(weights)])
        if weights
        else torch.zeros(0, dtype=torch.float64),
    }


def _step(parallel: Parallel, optimizer: TrainingOptimizer, case: Case, step: int) -> Any:
    # Rounding to bfloat16 depends on how the rows are cut, so there one process takes the rows as two would.
    ranks = [0, 1] if case.mode == "none" and case.precision != "float32" else [parallel.processes.rank]
    count = 2 if len(ranks) == 2 else parallel.processes.count
    batches = []
    for rank in ranks:
        mine = list(range(rank, ROWS, count))
        rows = Batch(*(tensor[mine] for tensor in vars(rows_of(step)).values()))
        batches += rows.split(len(mine) // case.micro_batches)
    optimizer.set_learning_rate_factor(1.0)
    return optimizer_step(
        parallel.model,
        optimizer,
        batches,
        precision=case.precision,
        gradient_clip=case.clip,
        parallel=parallel,
    )


def rows_of(step: int) -> Batch:
    """Rows of two documents each, cut elsewhere in every row, so that processes have different numbers of targets."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (ROWS, LENGTH), generator=draw)
    cuts = torch.randint(1, LENGTH, (ROWS, 1), generator=draw)
    index = torch.arange(LENGTH).expand(ROWS, LENGTH)
    documents = (index >= cuts).long()
    labels = ids.masked_fill((index < 2) & (torch.arange(ROWS)[:, None] % 2 == 0), -100)
    return Batch(ids, labels, index - documents * cuts, documents)


def _gap(mine: Tensor, wanted: Tensor) -> float:
    if mine.numel() == 0:
        return 0.0
    return float((mine - wanted).abs().max() / wanted.abs().max())
