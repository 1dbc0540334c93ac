"""Gradients of every head architecture on two processes, for `tests/heads/test_distributed.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from head_cases import ARCHITECTURES, head_model
from headway.heads.auxiliary import RegisterTokens
from headway.losses.objective import TrainingObjective
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens

TOKENS = random_tokens(4, 12)
ON_DRAFTS = TrainingObjective(train_on_drafts=True)
CASES: dict[str, tuple[str, TrainingObjective, str]] = {
    **{name: (name, TrainingObjective(), "none") for name in ARCHITECTURES},
    "sequential-fused-shared on drafts": ("sequential-fused-shared", ON_DRAFTS, "none"),
    "hydra on drafts": ("hydra", ON_DRAFTS, "none"),
    "transformer with token order": ("transformer", TrainingObjective(), "top"),
    "causal with registers": ("causal", TrainingObjective(), "mutor"),
}
WRAPPERS = ("ddp", "fsdp-bodies", "fsdp-root")


def compare(rank: int, folder: str) -> None:
    """Write, per architecture and wrapper, the largest relative difference from one process with all rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # As in one process with all rows, where every process would draw its own.
    RegisterTokens.distances = lambda self, rows, farthest: torch.full((rows,), 2)  # type: ignore[method-assign]
    found = {}
    for name in CASES:
        alone = _model(name)
        alone(TOKENS, labels=TOKENS).loss.backward()
        expected = {key: p.grad for key, p in alone.named_parameters()}
        for wrapper in WRAPPERS:
            model = _model(name)
            wrapped = _wrap(model, wrapper)
            rows = TOKENS[2 * rank : 2 * rank + 2]
            for _ in range(2):  # some faults show in the second step only
                model.zero_grad()
                wrapped(rows, labels=rows).loss.backward()
            found[f"{name} {wrapper}"] = _largest_gap(model, expected)
    if rank == 0:
        Path(folder, "gaps.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _model(name: str) -> MultiTokenLM:
    architecture, objective, auxiliary = CASES[name]
    model = head_model(architecture, "gpt2", dtype=torch.float64, auxiliary=auxiliary).train()
    model.train_towards(objective)
    return model


def _wrap(model: Any, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.family.layers:
        fully_shard(layer, mesh=mesh)
    for body in model.heads if wrapper == "fsdp-bodies" else ():
        if not isinstance(body, nn.ModuleList):
            fully_shard(body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _largest_gap(model: nn.Module, expected: dict[str, Tensor | None]) -> float:
    scale = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    worst = 0.0
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, expected[name]
        if gradient is None or wanted is None:
            return float("inf")
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        worst = max(worst, float((whole - wanted).abs().max()) / scale)
    return worst
