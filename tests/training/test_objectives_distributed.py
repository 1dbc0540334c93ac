"""Two processes train with schedules and objectives as one does, and nothing hangs where heads rest."""

from __future__ import annotations

import json

import pytest
import torch

from distributed_objectives import CASES, STEPS, compare


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    torch.multiprocessing.spawn(compare, args=(str(folder),), nprocs=2)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mode}-{case.name}")
def test_weights_and_losses_are_those_of_one_process(found, case):
    result = found[f"{case.mode}: {case.name}"]
    assert result["compared"] > STEPS
    # Muon orthogonalises in bfloat16.
    assert result["gap"] < (1e-2 if case.optimizer == "muon" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mode}-{case.name}")
def test_the_same_parameters_rest_as_in_one_process(found, case):
    result = found[f"{case.mode}: {case.name}"]
    assert result["resting"] == result["resting_alone"]
    assert bool(result["resting"][0]) == (case.schedule == "forward_curriculum")
    assert not result["resting"][-1]
