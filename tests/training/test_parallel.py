"""Steps on two processes are steps on one: DDP and FSDP2, every precision, accumulation and optimizer."""

from __future__ import annotations

import json

import pytest
import torch
import torch.multiprocessing

import distributed_training
from distributed_training import CASES, Case
from headway.errors import ConfigError
from headway.training.config import TrainConfig
from headway.training.launch import joined, started_processes
from headway.training.muon_sharing import owners
from headway.training.parallel import parallel_mode
from headway.training.step_shape import resumed_shape, step_shape

# Largest relative differences of loss, loss per offset, gradient norm, and of weights over the largest weight. Muon divides
# by a norm in bfloat16, and AdamW by the root of a small mean: both let weights feel rounding that losses do not.
LIMITS = {"float64": (1e-14, 1e-12), "adamw": (1e-6, 1e-4), "muon": (1e-4, 2e-3), "bfloat16": (1e-4, 2e-3)}


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(distributed_training.compare, args=(str(folder),), nprocs=2)
    return json.loads((folder / "gaps.json").read_text(encoding="utf-8"))


def limits(case: Case) -> tuple[float, float]:
    if case.double:
        return LIMITS["float64"]
    return LIMITS["bfloat16" if case.precision != "float32" else case.optimizer]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_step_as_one(gaps, case):
    figure, weight = limits(case)
    found = gaps[case.name]
    assert {name: gap for name, gap in found.items() if name != "weights" and gap > figure} == {}
    assert found["weights"] <= weight


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_matrices_that_are_shared_out_are_orthogonalised_to_the_bit_as_alone(gaps, mode):
    assert gaps[f"muon sharing {mode}"] == {"largest": 0.0}


def test_every_matrix_has_one_owner_and_costs_are_spread():
    shapes = [torch.Size(shape) for shape in [(8, 8)] * 4 + [(64, 8)] * 2]
    chosen = owners(shapes, count=2)
    assert sorted(chosen) == [0, 0, 0, 1, 1, 1]
    assert chosen[4] != chosen[5]


@pytest.mark.parametrize(
    ("wanted", "count", "mode"),
    [("auto", 1, "none"), ("none", 1, "none"), ("auto", 2, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")],
)
def test_auto_is_none_alone_and_ddp_together(wanted, count, mode):
    assert parallel_mode(wanted, count=count) == mode


@pytest.mark.parametrize(
    ("wanted", "count", "way_out"),
    [
        ("ddp", 1, "torchrun --nproc-per-node"),
        ("fsdp", 1, "--parallel none"),
        ("none", 2, "pass --parallel ddp or fsdp"),
    ],
)
def test_ways_that_do_not_fit_the_number_of_processes_are_refused(wanted, count, way_out):
    with pytest.raises(ConfigError, match=way_out):
        parallel_mode(wanted, count=count)


def test_one_device_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started_processes() == 2
    with pytest.raises(ConfigError, match="pass --device cuda, so that each process takes its own"), joined("cuda:0"):
        pass


CONFIG = TrainConfig(hidden_size=8, num_layers=4, num_heads=2, batch_size=2, gradient_accumulation_steps=2)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_resumed_run_keeps_the_rows_of_its_steps(processes, micro_batches):
    saved = step_shape(CONFIG, processes=4)
    shape, told = resumed_shape(CONFIG, processes=processes, saved_config=CONFIG.to_dict(), saved_step=saved.to_json())
    assert (shape.rows, shape.micro_batches) == (16, micro_batches)
    assert (told is None) == (processes == 4)


def test_options_that_were_changed_on_purpose_are_taken_at_their_word():
    saved = step_shape(CONFIG, processes=4)
    shape, told = resumed_shape(
        CONFIG, processes=2, saved_config=CONFIG.to_dict() | {"batch_size": 1}, saved_step=saved.to_json()
    )
    assert (shape.rows, told) == (8, None)


def test_processes_that_cannot_share_the_rows_are_refused_with_a_way_out():
    saved = step_shape(CONFIG, processes=4)
    with pytest.raises(ConfigError, match="so that their product times 3 is 16"):
        resumed_shape(CONFIG, processes=3, saved_config=CONFIG.to_dict(), saved_step=saved.to_json())
