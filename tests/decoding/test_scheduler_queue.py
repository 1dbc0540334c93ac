"""The scheduler's queue, limits, threads and failures."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from headway.decoding.cache import RaggedCache
from headway.decoding.changing_batch import ChangingBatch
from headway.decoding.executor import EagerExecutor
from headway.decoding.requests import Request
from headway.decoding.scheduler import Scheduler
from headway.errors import DecodingError, QueueFullError
from scheduler_cases import alone
from tiny_models import random_tokens, tiny_model

MODEL = tiny_model(dtype=torch.float64)


def _prompt(length, seed=0):
    return tuple(random_tokens(length, seed=seed).tolist())


def _requests(count, *, new=8):
    return [Request(_prompt(3 + row, seed=row), new) for row in range(count)]


# ------------------------------------------------------------------------------------------------------- queue and limits


def test_requests_are_admitted_in_the_order_of_their_submission():
    scheduler = Scheduler(MODEL, max_rows=2)
    handles = [scheduler.submit(request) for request in _requests(5)]
    first = []
    while not scheduler.idle:
        for part in scheduler.step().emitted:
            if part.id not in first:
                first.append(part.id)
        assert scheduler.statistics.live_rows <= 2
    assert first == [handle.id for handle in handles]


def test_a_full_queue_refuses_with_its_limit():
    scheduler = Scheduler(MODEL, max_waiting=2)
    for request in _requests(2):
        scheduler.submit(request)
    with pytest.raises(QueueFullError, match="no more than max_waiting=2 may; try again later"):
        scheduler.submit(_requests(1)[0])
    scheduler.step()
    assert scheduler.submit(_requests(1)[0]).result().finish_reason == "length"


def test_more_requests_than_the_queue_holds_can_be_served_at_once():
    found = Scheduler(MODEL, max_rows=2, max_waiting=1).generate(_requests(5))
    assert [completion.tokens for completion in found] == [alone(MODEL, request) for request in _requests(5)]


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(MODEL, max_cache_tokens=20)
    with pytest.raises(DecodingError, match=r"needs 34 slots .* the limit is 20 .* pass max_new_tokens=7 or less"):
        scheduler.submit(Request(_prompt(10), 21))
    assert scheduler.submit(Request(_prompt(10), 7)).result().tokens == alone(MODEL, Request(_prompt(10), 7))


@pytest.mark.parametrize("limit", [60, 90, 200])
def test_the_cache_stays_within_its_limit_and_shrinks(limit):
    scheduler = Scheduler(MODEL, max_rows=8, max_cache_tokens=limit)
    asked = [Request(_prompt(2 + row % 5, seed=row), [4, 40, 9][row % 3]) for row in range(12)]
    handles = [scheduler.submit(request) for request in asked]
    rows, allocated = [], []
    while not scheduler.idle:
        scheduler.step()
        rows.append(scheduler.statistics.live_rows)
        allocated.append(scheduler.statistics.cache_tokens_allocated)
        assert allocated[-1] <= limit
        assert scheduler.statistics.cache_tokens_used <= allocated[-1]
    assert max(rows) > 1 or limit == 60
    assert allocated[-1] == 0
    assert min(amount for amount in allocated if amount) < max(allocated)
    assert [handle.result().tokens for handle in handles] == [alone(MODEL, request) for request in asked]


def test_a_limit_in_bytes_is_one_in_tokens():
    by_tokens = Scheduler(MODEL, max_cache_tokens=100)
    per_token = 2 * 8 * 32 * (3 + 3)  # keys and values, float64, width, layers of base and heads
    assert Scheduler(MODEL, max_cache_bytes=100 * per_token).statistics.cache_tokens_limit == 100
    assert by_tokens.statistics.cache_tokens_limit == 100
    with pytest.raises(DecodingError, match="pass one of them"):
        Scheduler(MODEL, max_cache_bytes=1, max_cache_tokens=1)


def test_a_long_prompt_delays_the_others_by_one_piece_per_step(monkeypatch):
    columns = []
    original = EagerExecutor._run
    monkeypatch.setattr(
        EagerExecutor,
        "_run",
        lambda self, ids, *rest: columns.append(ids.shape[1]) or original(self, ids, *rest),
    )
    scheduler = Scheduler(MODEL, max_rows=3, prefill_chunk_tokens=8)
    talking = scheduler.submit(Request(_prompt(4), 40))
    scheduler.step()
    long = scheduler.submit(Request(_prompt(50), 4))
    columns.clear()
    gained = []
    while not long.finished:
        report = scheduler.step()
        gained.append(sum(len(part.tokens) for part in report.emitted if part.id == talking.id))
    assert max(columns) <= 8
    assert len(gained) >= 50 // 8
    assert all(gained[: 50 // 8])
    assert long.result().tokens == alone(MODEL, Request(_prompt(50), 4))


def test_short_prompts_that_wait_are_read_together(monkeypatch):
    reads = []
    original = EagerExecutor.prefill
    monkeypatch.setattr(
        EagerExecutor,
        "prefill",
        lambda self, **options: reads.append(self._prompts.batch) or original(self, **options),
    )
    Scheduler(MODEL, max_rows=8, prefill_chunk_tokens=20).generate(_requests(6))
    # Prompts of 3 to 8 tokens: 3 x 5 fit into a piece of 20, 4 x 6 do not, 2 x 7 do, 3 x 8 do not.
    assert reads == [3, 2, 1]


def test_a_longer_queue_than_rows_keeps_all_rows_busy():
    scheduler = Scheduler(MODEL, max_rows=3, num_draft_tokens=0)
    for request in _requests(9, new=6):
        scheduler.submit(request)
    rows = []
    while not scheduler.idle:
        rows.append(scheduler.step().statistics.live_rows)
    assert rows.count(3) >= 10


# ------------------------------------------------------------------------------------------------- ends, handles, statistics


def test_a_handle_gives_tokens_as_they_come_and_can_be_read_again():
    scheduler = Scheduler(MODEL)
    handle = scheduler.submit(Request(_prompt(5), 9))
    other = scheduler.submit(Request(_prompt(7), 5))
    parts = list(handle)
    assert [token for part in parts for token in part] == alone(MODEL, Request(_prompt(5), 9))
    assert list(handle) == parts
    # Whoever waits serves everybody.
    assert other.finished
    assert handle.result().prompt_tokens == 5


def test_a_completion_says_how_far_its_forwards_got_and_how_long_it_took():
    ticks = iter(range(10_000))
    scheduler = Scheduler(MODEL, max_rows=1, clock=lambda: float(next(ticks)))
    first, second = (scheduler.submit(Request(_prompt(5), 9, temperature=1.0, seed=seed)) for seed in (3, None))
    completion = first.result()
    assert completion.seed == 3
    assert 1 + sum(map(sum, completion.acceptance.lengths)) == len(completion.tokens)
    assert 0 < completion.queued_seconds < completion.first_token_seconds < completion.seconds
    # A seed that was drawn is told, so that the text can be had again.
    again = second.result()
    assert again.queued_seconds > completion.queued_seconds
    repeat = Request(_prompt(5), 9, temperature=1.0, seed=again.seed)
    assert again.tokens == alone(MODEL, repeat)


def test_the_report_has_the_decisions_for_every_size_of_the_batch():
    scheduler = Scheduler(MODEL, max_rows=4, num_draft_tokens="auto")
    assert scheduler.report().control == {}
    shown = scheduler.submit(_requests(1, new=24)[0])
    for _ in range(4):
        scheduler.step()
    alone_for = len(scheduler.report().control[1].lengths)
    assert alone_for == 4
    scheduler.generate(_requests(3, new=9))
    shown.result()
    report = scheduler.report()
    # Three or four rows learn together; rows that end one by one bring the smaller sizes.
    assert {1, 4} <= set(report.control) <= {1, 2, 4}
    assert report.statistics == scheduler.statistics
    assert all(0 <= length <= 3 for own in report.control.values() for length in own.lengths)
    document = report.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [own["most_rows"] for own in document["control"]] == sorted(report.control)
    assert document["control"][0]["lengths"] == list(report.control[1].lengths)
    assert document["finished"] == 4
    plain = Scheduler(MODEL, num_draft_tokens=2)
    plain.generate(_requests(1))
    assert plain.report().to_dict()["control"] == []


def test_statistics_count_what_was_emitted():
    scheduler = Scheduler(MODEL, max_rows=2)
    found = scheduler.generate(_requests(5))
    statistics = scheduler.statistics
    assert statistics.emitted_tokens == sum(len(completion.tokens) for completion in found)
    assert statistics.finished == 5
    assert (statistics.waiting, statistics.live_rows, statistics.reading_rows) == (0, 0, 0)
    assert statistics.tokens_per_second > 0
    assert statistics.mean_acceptance_length >= 1
    assert statistics.to_dict()["steps"] == statistics.steps


def test_a_cancelled_request_leaves_and_keeps_its_tokens():
    scheduler = Scheduler(MODEL, max_rows=1)
    running, waiting = (scheduler.submit(request) for request in _requests(2, new=30))
    for _ in range(3):
        scheduler.step()
    assert running.cancel()
    assert scheduler.cancel(waiting.id)
    assert waiting.finished
    assert not running.finished
    report = scheduler.step()
    assert [(part.id, part.finish_reason) for part in report.emitted] == [(running.id, "cancelled")]
    text = alone(MODEL, _requests(1, new=30)[0])
    assert 0 < len(running.result().tokens) < 30
    assert running.result().tokens == text[: len(running.result().tokens)]
    assert not running.cancel()
    assert not scheduler.cancel(99)
    assert scheduler.idle


# ------------------------------------------------------------------------------------------------------------- failures


def _refuse(ids, scores):
    if ids.shape[1] > 9:
        raise RuntimeError("no more than nine")
    return scores


@pytest.mark.parametrize("options", [{}, {"sample_drafts": True}, {"tree": 5}], ids=str)
def test_a_processor_that_fails_ends_its_own_request_alone(options):
    scheduler = Scheduler(MODEL, **options)
    good = [Request(_prompt(5, seed=row), 12) for row in range(2)]
    handles = [scheduler.submit(good[0])]
    bad = scheduler.submit(Request(_prompt(6), 20, temperature=1.0, logits_processors=(_refuse,)))
    handles.append(scheduler.submit(good[1]))
    assert [handle.result().tokens for handle in handles] == [alone(MODEL, request) for request in good]
    found = bad.result()
    assert (found.finish_reason, str(found.error)) == ("error", "no more than nine")
    assert len(found.tokens) <= 4
    with pytest.raises(DecodingError, match="request 1 failed: no more than nine"):
        list(bad)


def test_a_criterion_that_fails_ends_its_own_request_alone():
    scheduler = Scheduler(MODEL)
    bad = scheduler.submit(Request(_prompt(6), 20, stopping_criteria=(lambda ids, scores: 1 / 0,)))
    good = scheduler.submit(Request(_prompt(5), 12))
    assert good.result().tokens == alone(MODEL, Request(_prompt(5), 12))
    assert isinstance(bad.result().error, ZeroDivisionError)


@pytest.mark.parametrize("where", ["prefill", "block", "absorb"])
def test_a_forward_that_fails_ends_the_requests_in_it_and_no_other(where, monkeypatch):
    scheduler = Scheduler(MODEL, max_rows=2)
    first = scheduler.submit(Request(_prompt(5), 30))
    scheduler.step()
    second, third = (scheduler.submit(Request(_prompt(6, seed=row), 12)) for row in range(2))
    with monkeypatch.context() as patch:

        def fail(*arguments, **options):
            raise MemoryError("no room")

        patch.setattr(RaggedCache if where == "absorb" else EagerExecutor, where, fail)
        scheduler.step()
    assert third.result().tokens == alone(MODEL, Request(_prompt(6, seed=1), 12))
    assert second.finished
    failed = {"prefill": [second], "block": [first, second], "absorb": [first, second]}[where]
    assert all(isinstance(handle.result().error, MemoryError) for handle in failed)
    if first not in failed:
        assert first.result().tokens == alone(MODEL, Request(_prompt(5), 30))
    assert scheduler.idle
    assert scheduler.statistics.cache_tokens_allocated == 0


def test_an_interrupt_passes_through_and_ends_what_was_in_the_forward(monkeypatch):
    scheduler = Scheduler(MODEL)
    handle = scheduler.submit(Request(_prompt(5), 30))
    scheduler.step()
    with monkeypatch.context() as patch:

        def interrupt(self):
            raise KeyboardInterrupt

        patch.setattr(ChangingBatch, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
    assert handle.result().finish_reason == "error"
    assert scheduler.submit(Request(_prompt(5), 12)).result().tokens == alone(MODEL, Request(_prompt(5), 12))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": (), "max_new_tokens": 3}, "at least one token"),
        ({"prompt": (1,), "max_new_tokens": 0}, "at least 1"),
        ({"prompt": (1,), "max_new_tokens": 3, "temperature": -1.0}, "temperature must be at least 0"),
        ({"prompt": (1,), "max_new_tokens": 3, "top_p": 0.0}, "top_p must be above 0"),
        ({"prompt": (1,), "max_new_tokens": 3, "stop_sequences": ((),)}, "sequences of at least one token"),
        ({"prompt": (1,), "max_new_tokens": 3, "stop_strings": "end"}, "a list of texts"),
        ({"prompt": (1, 40), "max_new_tokens": 3}, r"token ids must be in 0\.\.39: got 40"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(request_, message):
    with pytest.raises(DecodingError, match=message):
        Scheduler(MODEL).submit(Request(**request_))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "no option temperature; sampling is a request's own"),
        ({"seed": 1}, "a seed is a request's own"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"executor": "graph"}, "batches that do not change"),
    ],
)
def test_options_that_a_scheduler_cannot_have_are_refused(options, message):
    with pytest.raises(DecodingError, match=message):
        Scheduler(MODEL, **options)


# -------------------------------------------------------------------------------------------------------------- threads


def test_requests_come_from_many_threads_while_one_steps():
    scheduler = Scheduler(MODEL, max_rows=3)
    worker = threading.Thread(target=scheduler.run)
    worker.start()
    found = {}

    def ask(number):
        request = Request(_prompt(3 + number, seed=number), 6 + number)
        handle = scheduler.submit(request)
        if number % 4 == 3:
            handle.cancel()
        found[number] = (request, [token for part in handle for token in part], handle.result(timeout=120))

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(timeout=240)
    scheduler.close()
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert len(found) == 8
    for number, (request, streamed, completion) in found.items():
        text = alone(MODEL, request)
        assert completion.tokens == streamed == text[: len(streamed)]
        assert number % 4 == 3 or streamed == text


def test_closing_cancels_what_is_left_and_refuses_more():
    scheduler = Scheduler(MODEL, max_rows=1)
    handles = [scheduler.submit(request) for request in _requests(3, new=20)]
    scheduler.step()
    scheduler.close()
    assert [handle.result().finish_reason for handle in handles] == ["cancelled"] * 3
    with pytest.raises(DecodingError, match="the scheduler is closed"):
        scheduler.submit(_requests(1)[0])


def test_waiting_can_be_given_up():
    scheduler = Scheduler(MODEL)
    scheduler._drivers = 1  # as if some thread were in `run` and had come to nothing
    handle = scheduler.submit(Request(_prompt(5), 30))
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.01 seconds"):
        handle.result(timeout=0.01)
