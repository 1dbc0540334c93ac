"""Resuming is exact with everything switched on at once: schedules, objectives, accumulation, loader threads, epoch end."""

import itertools
import typing

import pytest

from headway.training.config import TrainConfig
from headway.training.events import StepDone
from headway.training.loop import train
from small_runs import assert_same_run


class Killed(BaseException):
    """Ends a run from inside, as a kill does."""


def choices(field):
    """Every value of a closed choice, so that a value that is added is tried too."""
    return typing.get_args(typing.get_type_hints(TrainConfig)[field])


# Each schedule with another objective, until both are used up.
PAIRS = list(zip(choices("weight_schedule"), itertools.cycle(choices("objective")), strict=False))


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_a_run_killed_in_the_middle_of_a_schedule_ends_bit_for_bit_as_an_undisturbed_one(
    make_config, tmp_path, schedule, objective
):
    options = {
        "weight_schedule": schedule,
        "head_weight_after": 0.1 if schedule == "step" else None,
        "objective": objective,
        "optimizer": "muon",
        "precision": "bfloat16-residual",
        "gradient_accumulation_steps": 2,
        "loader_workers": 2,
        # 24 documents make some 30 rows: six steps of eight rows cross the ends of epochs
        "batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "checkpoint_every_steps": 3,
    }

    def kill(event):
        if isinstance(event, StepDone) and event.step == 5:
            raise Killed

    train(make_config("straight", **options))
    with pytest.raises(Killed):
        train(make_config("killed", **options), on_event=kill)
    assert train(make_config("killed", **options)).resumed_from_step == 3
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=6)


def test_every_schedule_and_every_objective_is_tried():
    assert {schedule for schedule, _ in PAIRS} == set(choices("weight_schedule"))
    assert {objective for _, objective in PAIRS} == set(choices("objective"))
