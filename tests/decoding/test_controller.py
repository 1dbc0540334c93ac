"""Decisions of the controller on simulated machines and texts: near the best fixed length, hardly ever below plain decoding."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from headway.decoding.controller import DraftController, RowStep, StepTime

LONGEST = 3
TOKENS = 1024
RESTART = 0.5  # plain forwards that going on after a rest costs beyond its heads

TEXTS = {
    "predictable": lambda place, offset: 0.9,
    "random": lambda place, offset: 0.03,
    "middling": lambda place, offset: (0.6, 0.2, 0.1)[offset],
    "alternating": lambda place, offset: 0.9 if place // 64 % 2 == 0 else 0.03,
    "alternating, random first": lambda place, offset: 0.9 if place // 64 % 2 else 0.03,
}
"""Conditional acceptance at a place of the text."""

MACHINES = {
    "cheap drafts": lambda length: 1 + 0.1 * length,
    "dear drafts": lambda length: 1 + 0.3 * length,
    "drafts that never pay": lambda length: 1 + 0.9 * length,
}
"""Seconds of a forward that verifies and drafts so many tokens."""


def simulate(cost, accept, *, fixed=None, rows=1, seed=0, noise=0.05, hiccups=0.0, tokens=TOKENS, times=None):
    """Seconds until every row has its tokens, the prefill not counted; with `fixed`, drafts of that length."""
    rng = random.Random(seed)
    clock = [0.0]
    controller = DraftController(LONGEST, clock=lambda: clock[0], times=times)
    made, verified, first = [0] * rows, 0, True
    while min(made) < tokens:
        length = controller.begin() if fixed is None else fixed
        steps = []
        for row, before in enumerate(made):
            if before >= tokens:
                continue
            right = 0
            while right < verified and rng.random() < accept(before + right, right):
                right += 1
            made[row] += right + 1
            steps.append(RowStep(min(verified, right + 1), right, right + 1))
        if not first:
            seconds = cost((verified + length) / 2) + (RESTART if length > 0 == verified else 0)
            clock[0] += seconds * rng.uniform(1 - noise, 1 + noise) * (20 if rng.random() < hiccups else 1)
        if fixed is None:
            controller.end(steps, verified=verified, prepared=length, measured=not first)
        verified, first = length, False
    return clock[0], controller


def ratios(machine, text, rows, *, seeds=6):
    """Times as fast as plain decoding, and as the best fixed length, per seed."""
    against_plain, against_best = [], []
    for seed in range(seeds):
        fixed = [
            simulate(MACHINES[machine], TEXTS[text], fixed=length, rows=rows, seed=seed)[0]
            for length in range(LONGEST + 1)
        ]
        seconds, _ = simulate(MACHINES[machine], TEXTS[text], rows=rows, seed=seed)
        against_plain.append(fixed[0] / seconds)
        against_best.append(min(fixed) / seconds)
    return against_plain, against_best


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_it_is_near_the_best_fixed_length_and_never_much_below_plain(machine, text, rows):
    against_plain, against_best = ratios(machine, text, rows)
    assert statistics.mean(against_plain) > 0.97
    assert min(against_plain) > 0.95
    assert statistics.mean(against_best) > (0.83 if text.startswith("alternating") else 0.94)


def test_predictable_text_gets_the_longest_drafts_and_random_text_hardly_any():
    _, predictable = simulate(MACHINES["cheap drafts"], TEXTS["predictable"])
    _, unpredictable = simulate(MACHINES["cheap drafts"], TEXTS["random"], rows=8)
    assert statistics.mean(predictable.lengths[10:]) > 2.8
    assert statistics.mean(unpredictable.lengths[10:]) < 0.15
    assert unpredictable.probes > 0


def test_it_finds_back_when_the_text_becomes_predictable():
    _, controller = simulate(
        MACHINES["cheap drafts"], lambda place, offset: 0.95 if place > 300 else 0.02, rows=4, tokens=2000
    )
    resting = controller.lengths[30:300]
    assert statistics.mean(resting) < 0.3
    assert statistics.mean(controller.lengths[420:]) > 2.5


def test_a_change_to_random_text_is_followed_within_some_tens_of_tokens():
    _, controller = simulate(MACHINES["dear drafts"], lambda place, offset: 0.95 if place < 400 else 0.0, tokens=500)
    # 400 tokens take about 110 forwards.
    change = next(index for index, length in enumerate(controller.lengths) if index > 90 and length == 0)
    assert 90 < change < 150
    assert statistics.mean(controller.lengths[change:]) < 0.35


@pytest.mark.parametrize("text", ["predictable", "random"])
def test_hiccups_of_the_machine_change_nothing(text):
    calm, _ = simulate(MACHINES["cheap drafts"], TEXTS[text], rows=4, seed=1)
    _, shaken = simulate(MACHINES["cheap drafts"], TEXTS[text], rows=4, seed=1, hiccups=0.02)
    assert calm > 0
    expected = 3 if text == "predictable" else 0
    assert statistics.mode(shaken.lengths) == expected
    assert sum(length == expected for length in shaken.lengths) > 0.85 * len(shaken.lengths)


def test_costs_that_were_measured_before_need_no_exploring():
    times = {}
    simulate(MACHINES["drafts that never pay"], TEXTS["random"], times=times)
    assert times[0].seconds == pytest.approx(1, rel=0.15)
    assert times[LONGEST].seconds == pytest.approx(1 + 0.9 * LONGEST, rel=0.15)
    _, again = simulate(MACHINES["drafts that never pay"], TEXTS["random"], times=times)
    assert again.lengths[:3] == [LONGEST, 0, 0]
    assert set(again.lengths[1:]) == {0}


def test_it_never_drafts_where_there_is_nothing_to_draft_with():
    controller = DraftController(0, clock=lambda: 0.0)
    for _ in range(5):
        assert controller.begin() == 0
        controller.end([RowStep(0, 0, 1)], verified=0, prepared=0)
    assert controller.report().switches == 0


def test_what_it_decides_depends_on_the_past_alone():
    """The same past, another future: the same decision. The draft that is being verified is not part of the past."""

    def decisions(last_right):
        clock = [0.0]
        controller = DraftController(LONGEST, clock=lambda: clock[0])
        rng = random.Random(0)
        verified = 0
        for index in range(40):
            length = controller.begin()
            right = min(verified, rng.randint(0, 3)) if index < 39 else last_right
            clock[0] += 1 + 0.1 * verified + (5.0 * last_right if index == 39 else 0)
            controller.end([RowStep(verified, right, right + 1)], verified=verified, prepared=length)
            verified = length
        return controller.lengths

    assert decisions(0) == decisions(3)


def test_step_times_ignore_single_outliers_and_follow_lasting_changes():
    step_time = StepTime(9.0)
    for seconds in (1.0, 1.0, 1.0, 1.0):
        step_time.add(seconds)
    assert step_time.seconds == pytest.approx(1.0)
    step_time.add(50.0)
    assert step_time.seconds == pytest.approx(1.0)
    for _ in range(40):
        step_time.add(2.0)
    assert step_time.seconds == pytest.approx(2.0, rel=0.01)


def test_a_busier_machine_is_slower_for_every_length():
    clock = [0.0]
    controller = DraftController(LONGEST, clock=lambda: clock[0])
    verified = 0
    for index in range(200):
        length = controller.begin()
        clock[0] += (1 + 0.1 * verified) * (3 if index >= 100 else 1)
        controller.end([RowStep(verified, verified, verified + 1)], verified=verified, prepared=length)
        verified = length
    assert controller.seconds(LONGEST) == pytest.approx(3.9, rel=0.05)
    assert controller.seconds(0) == pytest.approx(3.0, rel=0.05)


def test_the_report_is_json():
    _, controller = simulate(MACHINES["cheap drafts"], TEXTS["middling"], tokens=64)
    document = json.loads(json.dumps(controller.report().to_dict(), allow_nan=False))
    assert document["lengths"] == controller.lengths
    assert set(document) == {"lengths", "switches", "probes", "seconds_per_forward", "acceptance"}
    assert len(document["acceptance"]) == LONGEST
    assert document["switches"] > 0
