"""Schedules and objectives on two processes beside one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_training import ROWS, rows_of
from headway.data.loader import Batch
from headway.losses.objective import TrainingObjective
from headway.losses.weights import WeightPlan
from headway.processes import Processes, process_group_of_all
from headway.training.config import TrainConfig
from headway.training.optimizers import TrainingOptimizer
from headway.training.parallel import parallelize
from headway.training.step import optimizer_step
from tiny_models import tiny_base, tiny_model

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A run of four steps; one process and two must do the same."""

    mode: Any
    name: str
    family: str = "llama"
    heads: dict[str, Any] = field(default_factory=dict)
    schedule: Any = "constant"
    objective: TrainingObjective = TrainingObjective()  # noqa: RUF009 (frozen)
    teacher: bool = False
    optimizer: str = "adamw"
    micro_batches: int = 2


_SETTINGS: list[dict[str, Any]] = [
    {"name": "forward", "schedule": "forward_curriculum"},
    {"name": "reverse, muon", "schedule": "reverse_curriculum", "optimizer": "muon", "micro_batches": 1},
    {"name": "reverse, own unembeddings", "schedule": "reverse_curriculum", "heads": {"heads": "medusa"}},
    {
        "name": "forward, chained",
        "schedule": "forward_curriculum",
        "heads": {"heads": "sequential", "share_modules": True},
    },
    {"name": "kl", "objective": TrainingObjective(divergence="kl"), "family": "llama-gqa-tied"},
    {"name": "detached", "objective": TrainingObjective(detach_trunk="on"), "family": "llama-gqa-tied"},
    {
        "name": "taught, forward",
        "objective": TrainingObjective(divergence="hybrid", cross_entropy_share=0.2, distill_next_token=True),
        "teacher": True,
        "schedule": "forward_curriculum",
        "heads": {"markov_rank": 4},
    },
]
CASES = [Case(mode=mode, **setting) for mode in ("ddp", "fsdp") for setting in _SETTINGS]


def compare(rank: int, folder: str) -> None:
    """Write, per case, how far weights and losses are from those of one process, and which parameters rested."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    with process_group_of_all(local_rank=rank) as processes:
        for case in CASES:
            alone, resting_alone = _run(replace(case, mode="none"), Processes())
            together, resting = _run(case, processes)
            gaps = {
                name: float((together[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
                for name, wanted in alone.items()
                if name in together
            }
            found[f"{case.mode}: {case.name}"] = {
                "gap": max(gaps.values()),
                "compared": len(gaps),
                "resting": resting,
                "resting_alone": resting_alone,
            }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _run(case: Case, processes: Processes) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Weights after the last step with the losses, and per step the parameters without optimizer state."""
    model = tiny_model(case.family, num_future_tokens=3, dtype=torch.float64, **case.heads).train()
    teacher = tiny_base("qwen2", dtype=torch.float64, seed=4) if case.teacher else None
    model.train_towards(case.objective, teacher=teacher)
    plan = WeightPlan(weights=(1.0, 0.5, 0.25), schedule=case.schedule, steps=STEPS)
    parallel = parallelize(model, case.mode, processes, torch.device("cpu"), heads_may_rest=plan.heads_may_rest)
    config = TrainConfig(hidden_size=8, num_layers=4, num_heads=2, optimizer=case.optimizer, learning_rate=1e-2)
    optimizer = TrainingOptimizer(model, config, sharing=parallel.sharing)
    optimizer.set_learning_rate_factor(1.0)
    results: dict[str, Tensor] = {}
    resting = []
    for step in range(STEPS):
        mine = list(range(processes.rank, ROWS, processes.count))
        rows = Batch(*(tensor[mine] for tensor in vars(rows_of(step)).values()))
        outcome = optimizer_step(
            model,
            optimizer,
            list(rows.split(len(mine) // case.micro_batches)),
            precision="float32",
            gradient_clip=0.5,
            offset_weights=plan.at(step + 1),
            parallel=parallel,
        )
        assert outcome is not None
        nats = [0.0 if value is None else value for value in outcome.loss_per_offset or ()]
        results[f"losses of step {step}"] = torch.tensor([outcome.loss, *nats], dtype=torch.float64)
        resting.append(sorted(name for name in optimizer.state_tensors() if name.startswith("resting/")))
    return results | parallel.whole_state(), resting
