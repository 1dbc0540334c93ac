"""Loss weights over training: each schedule is its formula, and a step alone decides."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.losses.objective import DetachTrunk, Divergence
from headway.losses.weights import CURRICULA, WeightPlan, WeightSchedule, full_weights
from headway.training.config import TrainConfig
from headway.training.fields import field_specs, required_type

plans = st.builds(
    WeightPlan,
    weights=st.integers(1, 6).map(lambda n: tuple(0.5**k for k in range(n))),
    schedule=st.sampled_from(get_args(WeightSchedule)),
    steps=st.integers(1, 40),
    after=st.sampled_from([0.0, 1 / 3, 1.0]),
)


def plan(schedule, *, n=4, steps=100, **more):
    return WeightPlan(weights=(1.0,) * n, schedule=schedule, steps=steps, **more)


def test_linear_and_sine_rise_from_one_step_to_the_whole_weight():
    linear, sine = plan("linear"), plan("sine")
    for step in (1, 25, 50, 99, 100):
        assert linear.at(step)[1:] == (pytest.approx(step / 100),) * 3
        assert sine.at(step)[1:] == (pytest.approx(math.sin(math.pi * step / 200)),) * 3
    assert linear.at(1000) == sine.at(1000) == (1.0, 1.0, 1.0, 1.0)


def test_the_step_of_deepseek_goes_from_0_3_to_0_1_after_its_last_step():
    weights = full_weights(2, normalize=True, head_weight=0.3)
    deepseek = WeightPlan(weights=weights, schedule="step", steps=10, after=0.1 / 0.3)
    assert [deepseek.at(step)[1] for step in (1, 10)] == [0.3, 0.3]
    assert deepseek.at(11)[1] == pytest.approx(0.1)


@pytest.mark.parametrize(("n", "steps"), [(4, 100), (3, 10), (5, 3), (1, 7)])
def test_the_forward_curriculum_adds_the_head_of_a_stage_at_its_first_step_and_not_before(n, steps):
    curriculum = plan("forward_curriculum", n=n, steps=steps)
    for step in range(1, 2 * steps):
        stage = min(n - 1, math.floor((step - 1) / (steps / n) + 1e-9))  # stages of S/n steps, as the paper has them
        assert curriculum.at(step) == (1.0,) * (stage + 1) + (0.0,) * (n - 1 - stage)


@pytest.mark.parametrize(("n", "steps"), [(4, 100), (3, 10), (5, 3), (1, 7)])
def test_the_reverse_curriculum_is_the_forward_one_run_backwards_through_its_stages(n, steps):
    forward, reverse = plan("forward_curriculum", n=n, steps=steps), plan("reverse_curriculum", n=n, steps=steps)
    for step in range(1, 2 * steps):
        assert reverse.active_offsets(step) == n + 1 - forward.active_offsets(step)


def test_fading_out_is_the_record_of_modded_nanogpt():
    fade = WeightPlan(weights=(1.0, 0.5, 0.25), schedule="fade", steps=300)
    assert fade.at(1) == (1.0, 0.5, 0.25)
    assert fade.at(51) == (1.0, 0.5, 0.125)
    assert fade.at(101) == (1.0, 0.5, 0.0)
    assert fade.at(151) == (1.0, 0.25, 0.0)
    assert fade.at(201) == fade.at(300) == fade.at(400) == (1.0, 0.0, 0.0)


@given(plan=plans)
def test_switches_are_the_steps_at_which_the_trained_offsets_change(plan):
    active = [plan.active_offsets(step) for step in range(1, plan.steps + 2)]
    changes = [
        (step, now)
        for step, (before, now) in enumerate(zip([None, *active], active, strict=False), start=1)
        if now != before
    ]
    assert list(plan.switches()) == changes


@given(plan=plans, step=st.integers(1, 100))
def test_the_next_token_keeps_its_weight_and_no_weight_leaves_its_limits(plan, step):
    weights = plan.at(step)
    assert weights[0] == plan.weights[0]
    assert all(0 <= now <= full for now, full in zip(weights, plan.weights, strict=True))
    if 0.0 in weights and plan.schedule in CURRICULA:
        assert plan.heads_may_rest


@given(plan=plans)
def test_a_plan_under_which_no_head_may_rest_gives_every_offset_a_weight_at_every_step(plan):
    if not plan.heads_may_rest:
        assert all(0.0 not in plan.at(step) for step in range(1, plan.steps + 3))


def test_geometric_weights_are_medusas_and_fastmtps():
    assert full_weights(4, decay=0.8, head_weight=0.2) == pytest.approx((1, 0.16, 0.128, 0.1024))
    fast = full_weights(4, decay=0.6, normalize=True)[1:]
    assert fast == pytest.approx([0.6**k / (1 + 0.6 + 0.36) for k in range(3)])
    assert full_weights(3, given=(2.0, 1.0, 3.0), normalize=True, head_weight=0.5) == (2.0, 0.125, 0.375)
    assert full_weights(1, normalize=True) == (1.0,)


def test_the_choices_of_a_run_are_those_of_the_loss():
    specs = field_specs(TrainConfig)
    for field, choices in (
        ("weight_schedule", WeightSchedule),
        ("objective", Divergence),
        ("detach_trunk", DetachTrunk),
    ):
        assert get_args(required_type(specs[field].annotation)) == get_args(choices)
