"""Decisions of the controller on simulated machines and texts: never below plain decoding by more than is allowed, and fast."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from headway.decoding.controller import ALLOWED_AT_ONCE, ALLOWED_SHARE, DraftController, Experience, RowStep
from headway.decoding.forward_costs import PARTED, PLAIN, ForwardCosts
from simulated_decoding import LONGEST, MACHINES, TEXTS, experience_of, ratio_to_plain, simulate


def pooled(ratios):
    """Of many generations together: time over time."""
    return 1 / statistics.mean(1 / ratio for ratio in ratios)


# ------------------------------------------------------------------------------------------------------ never slower than off


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_generations_of_a_model_that_is_known_are_never_slower_than_plain_decoding(machine, text):
    """Costs are known from other texts, which taught it to hope (predictable) or to give up (random)."""
    ratios = []
    for seed in range(4):
        known = experience_of(MACHINES[machine])
        for earlier in ("predictable", "random", text):
            simulate(MACHINES[machine], TEXTS[earlier], 256, seed=seed, experience=known)
        ratios.append(ratio_to_plain(MACHINES[machine], TEXTS[text], 256, seed=100 + seed, experience=known))
    assert pooled(ratios) > 0.97
    assert min(ratios) > 0.93


@pytest.mark.parametrize("machine", MACHINES)
def test_what_drafting_loses_is_bounded_by_the_allowance_whatever_the_text(machine):
    """Costs without noise, and the worst text for what it has learnt: every draft is wrong from now on."""
    known = experience_of(MACHINES[machine])
    exact = {"noise": 0.0, "hiccups": 0.0, "drift": 0.0}
    for seed in range(3):
        for text in ("predictable", "middling"):
            simulate(MACHINES[machine], TEXTS[text], 512, seed=seed, experience=known, **exact)
    for tokens in (32, 64, 256):
        spent, controller = simulate(MACHINES[machine], lambda place, offset: 0.0, tokens, experience=known, **exact)
        # Beyond it: kinds of forwards that were never measured, whose cost can only be guessed.
        assert spent - (tokens - 1) < ALLOWED_AT_ONCE + ALLOWED_SHARE * tokens + 0.3, controller.lengths


def test_the_balance_is_what_drafting_has_saved():
    """By true costs, where they are measured without noise."""
    known = experience_of(MACHINES["batch 1"])
    exact = {"noise": 0.0, "hiccups": 0.0, "drift": 0.0}
    for seed in range(4):
        spent, controller = simulate(
            MACHINES["batch 1"], TEXTS["predictable"], 512, seed=seed, experience=known, **exact
        )
    assert controller.balance() == pytest.approx(511 - spent, rel=0.05)


# ------------------------------------------------------------------------------------------------------------- and fast


@pytest.mark.parametrize(("machine", "least"), [("batch 1", 3.0), ("batch 2", 2.8), ("batch 4", 1.7), ("batch 8", 1.3)])
def test_predictable_text_gets_long_drafts(machine, least):
    ratios = []
    for seed in range(4):
        known = experience_of(MACHINES[machine])
        simulate(MACHINES[machine], TEXTS["predictable"], 256, seed=seed, experience=known)
        ratios.append(ratio_to_plain(MACHINES[machine], TEXTS["predictable"], 256, seed=9 + seed, experience=known))
    assert pooled(ratios) > least


@pytest.mark.parametrize("text", ["alternating", "alternating, random first"])
def test_text_that_changes_its_kind_is_about_as_fast_as_with_the_best_fixed_length(text):
    machine = MACHINES["batch 1"]
    known, ratios = experience_of(machine), []
    for seed in range(6):
        ratios.append(ratio_to_plain(machine, TEXTS[text], 512, seed=seed, experience=known))
    fixed = [ratio_to_plain(machine, TEXTS[text], 512, fixed=length) for length in range(LONGEST + 1)]
    assert pooled(ratios[1:]) > 0.9 * max(fixed)


def test_random_text_gets_hardly_any_drafts_but_is_tried_again():
    _, controller = simulate(MACHINES["batch 8"], TEXTS["random"], 512)
    assert statistics.mean(controller.lengths) < 0.1
    assert controller.trials > 3


def test_it_finds_back_when_the_text_becomes_predictable():
    _, controller = simulate(
        MACHINES["batch 1"], lambda place, offset: 0.95 if place > 300 else 0.02, 1000, experience=None
    )
    assert statistics.mean(controller.lengths[:300]) < 0.3
    assert statistics.mean(controller.lengths[400:]) > 3


def test_drafts_that_can_only_be_tried_by_verifying_them_are_found_too():
    """As `sample_drafts` needs it."""
    known, machine = experience_of(MACHINES["batch 1"]), MACHINES["batch 1"]
    for seed in range(3):
        ratio = ratio_to_plain(machine, TEXTS["predictable"], 256, seed=seed, experience=known, trials=False)
        slow = ratio_to_plain(machine, TEXTS["random"], 256, seed=seed, experience=known, trials=False)
        assert slow > 0.95
    assert ratio > 2


@pytest.mark.parametrize("text", ["predictable", "random"])
def test_hiccups_of_the_machine_change_little(text):
    known = experience_of(MACHINES["batch 1"])
    for seed in range(3):
        _, shaken = simulate(MACHINES["batch 1"], TEXTS[text], 512, seed=seed, hiccups=0.03, experience=known)
    mean = statistics.mean(shaken.lengths)
    assert mean > 4 if text == "predictable" else mean < 0.2


def test_costs_and_acceptance_that_are_known_need_no_exploring():
    machine = MACHINES["drafts that never pay"]
    known = experience_of(machine)
    for seed in range(2):
        simulate(machine, TEXTS["random"], 256, seed=seed, experience=known)
    spent, controller = simulate(machine, TEXTS["random"], 256, experience=known)
    assert set(controller.lengths) == {0}
    assert spent < 1.02 * 255


# ------------------------------------------------------------------------------------------------------------ what it is


def test_it_never_drafts_where_there_is_nothing_to_draft_with():
    controller = DraftController(0, clock=lambda: 0.0)
    for _ in range(5):
        assert controller.begin() == 0
        controller.end([], verified=0, prepared=0)
    assert controller.report().switches == controller.trials == 0


def test_what_it_decides_depends_on_the_past_alone():
    """The same past, another future: the same decision. The draft that is being verified is not part of the past."""

    def decisions(last_right):
        clock = [0.0]
        known = Experience(costs_of(((0, 0), 1.0), ((1, 1), 1.1), ((7, 7), 1.2)), [9.0] * LONGEST, [8.0] * LONGEST)
        controller = DraftController(LONGEST, clock=lambda: clock[0], experience=known)
        rng = random.Random(0)
        verified, asked = 0, []
        for index in range(40):
            asked.append((controller.begin(), controller.trial))
            length = asked[-1][0]
            right = min(verified, rng.randint(0, 3)) if index < 39 else min(verified, last_right)
            clock[0] += 1 + 0.1 * verified + (5.0 * last_right if index == 39 else 0)
            controller.end([RowStep(right, right + 1)], verified=verified, prepared=length or controller.trial)
            verified = length
        return asked

    assert decisions(0) == decisions(3)
    assert any(length for length, _ in decisions(0))


def test_a_resting_controller_asks_for_nothing_between_two_trials():
    """What the loop may then leave out: rows and their tokens."""
    controller = DraftController(LONGEST, clock=iter(range(10**6)).__next__)
    for index in range(200):
        length = controller.begin()
        assert length == 0
        controller.end([RowStep(0, 1)] if controller.trial else [], verified=0, prepared=controller.trial)
        if (controller.trial and index) or controller.trial:
            controller.compared(1, 1, 0, over=True)
    assert 3 < controller.trials < 12


def costs_of(*kinds, forwards=6):
    """What is known after so many forwards of each kind."""
    costs = ForwardCosts()
    for kind, seconds in kinds:
        for _ in range(forwards):
            costs.add(kind, seconds)
    return costs


def test_the_pace_ignores_single_outliers_and_what_first_calls_cost_and_follows_lasting_changes():
    costs = ForwardCosts()
    for seconds in (9.0, 1.0, 1.0, 1.0, 1.0):
        costs.add(PLAIN, seconds)
    assert costs.plain_seconds == pytest.approx(1.0)
    costs.add(PLAIN, 50.0)
    assert costs.plain_seconds == pytest.approx(1.0)
    for _ in range(40):
        costs.add(PLAIN, 2.0)
    assert costs.plain_seconds == pytest.approx(2.0, rel=0.01)


def test_a_busier_machine_is_slower_for_every_kind_of_forward():
    costs = costs_of((PLAIN, 1.0), ((3, 3), 1.3), forwards=20)
    for _ in range(60):
        costs.add((3, 3), 3.9)
    assert costs.plain_seconds == pytest.approx(3.0, rel=0.15)
    assert costs.relative(3, 3) == pytest.approx(1.3, rel=0.15)
    # The next generation finds a machine that is fast again.
    costs.begin_generation()
    for _ in range(8):
        costs.add((3, 3), 1.3)
    assert costs.plain_seconds == pytest.approx(1.0, rel=0.15)
    assert costs.relative(3, 3) == pytest.approx(1.3, rel=0.15)


def test_a_cost_that_was_measured_wrongly_is_forgotten_the_sooner_the_less_it_rests_on():
    costs = costs_of((PLAIN, 1.0), ((1, 1), 5.0), forwards=2)
    assert costs.relative(1, 1) == pytest.approx(5.0)
    for _ in range(200):
        costs.add(PLAIN, 1.0)
    assert costs.longest_known == 0
    assert costs.relative(1, 1) < 1.5
    # The second time it is believed for longer.
    for _ in range(2):
        costs.add((1, 1), 5.0)
    for _ in range(200):
        costs.add(PLAIN, 1.0)
    assert costs.longest_known == 1


def test_a_shorter_draft_is_never_thought_to_cost_more_than_a_longer_one_that_is_known_better():
    costs = costs_of((PLAIN, 1.0), ((3, 3), 1.4))
    for _ in range(2):
        costs.add((1, 1), 4.0)
    assert costs.relative(1, 1) == costs.relative(3, 3) == pytest.approx(1.4)


def test_no_draft_is_thought_to_cost_less_than_none():
    assert costs_of((PLAIN, 1.0), ((1, 1), 0.8)).relative(1, 1) == 1.0


@pytest.mark.parametrize("wrong", [0.2, 6.0])
def test_a_wrong_beginning_is_corrected_in_both_directions(wrong):
    """Drafts that look too dear are not made, plain decoding that looks too dear is not done: neither would correct itself."""
    machine, ratios = MACHINES["batch 4"], []
    known = experience_of(machine)
    for kind in (PLAIN, (1, 1), (3, 3)):
        for _ in range(2):
            known.costs.add(kind, wrong if kind != PLAIN else 1.0)
    for seed in range(12):
        ratios.append(ratio_to_plain(machine, TEXTS["middling"], 256, seed=seed, experience=known))
    assert pooled(ratios[6:]) > 0.98
    known.costs.add(PLAIN, 1.0)
    assert known.costs.relative(3, 3) == pytest.approx(machine.cost(3, 3, rested=False), rel=0.3)


@pytest.mark.parametrize("text", ["alternating", "random", "poor"])
def test_rows_are_not_parted_where_that_is_known_to_cost_more_than_may_be_lost(text):
    """Processors that read the text are called once per length of a row."""
    ratios = {True: [], False: []}
    for process in range(2):
        known = experience_of(MACHINES["batch 4"])
        for seed in range(8):
            ratio = ratio_to_plain(
                MACHINES["batch 4"], TEXTS[text], 256, seed=50 * process + seed, experience=known, parting=0.1
            )
            ratios[seed > 1].append(ratio)
    assert pooled(ratios[False]) > 0.9
    assert pooled(ratios[True]) > 0.98


def test_a_surcharge_of_parted_rows_is_charged_for_all_that_is_left():
    costs = costs_of(((1, 1), 1.1), (PLAIN, 1.0), (PARTED, 1.2), forwards=16)
    clock = [0.0]

    def first_length(remaining):
        known = Experience(costs, tried=[20.0] * LONGEST, right=[19.0] * LONGEST)
        return DraftController(LONGEST, clock=lambda: clock[0], experience=known).begin(remaining)

    assert costs.parted == pytest.approx(1.2, rel=0.03)
    assert first_length(1) > 0
    assert first_length(500) == 0


def test_a_surcharge_within_what_measurements_are_good_for_is_none():
    assert costs_of((PLAIN, 1.0), (PARTED, 1.04), forwards=16).parted == 1.0


@pytest.mark.parametrize(
    ("text", "least"), [("predictable", 1.5), ("random", 0.96), ("middling", 0.95), ("alternating", 1.0)]
)
def test_a_machine_on_which_much_else_runs_costs_gains_but_no_losses(text, least):
    """A quarter of noise on every forward, every tenth one four times as long, speed up and down by a third."""
    ratios = []
    for process in range(3):
        known = experience_of(MACHINES["batch 4"])
        for seed in range(8):
            noisy = {"noise": 0.25, "hiccups": 0.1, "drift": 0.3}
            ratios.append(
                ratio_to_plain(
                    MACHINES["batch 4"], TEXTS[text], 256, seed=100 * process + seed, experience=known, **noisy
                )
            )
    assert pooled(ratios) > least


def test_what_was_not_measured_lies_between_what_was():
    costs = costs_of((PLAIN, 1.0), ((2, 2), 1.2), ((6, 6), 2.0), forwards=4)
    assert costs.relative(4, 4) == pytest.approx(1.6)
    assert costs.relative(2, 6) == pytest.approx(1.6)
    assert 1 < costs.relative(0, 4) < costs.relative(4, 0) <= 1.6
    assert costs.relative(7, 7) > 2.0


def test_the_report_is_json():
    _, controller = simulate(MACHINES["batch 1"], TEXTS["middling"], 64)
    document = json.loads(json.dumps(controller.report().to_dict(), allow_nan=False))
    assert document["lengths"] == controller.lengths
    assert set(document) == {"lengths", "switches", "trials", "balance", "seconds_per_forward", "acceptance"}
    assert len(document["acceptance"]) == LONGEST
    assert document["switches"] > 0
