"""Beside its cache a generation holds on to its tokens and their counts alone, however long it is."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch

from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.requests import Request
from headway.decoding.scheduler import Scheduler
from tiny_models import VOCABULARY, tiny_model

FIRST, LAST = 64, 224
"""New tokens after which memory is read: once the first of everything has been made, and at the end."""

MOST_BYTES = 512
"""Live bytes of Python per new token. A forward leaves a tuple, a list and some numbers, 150 to 200; in a short text what is made
once in a while shows beside them."""

WAYS = {
    "chain": {},
    "plain": {"executor": "lean", "num_draft_tokens": 0},
    "auto": {"executor": "lean", "num_draft_tokens": "auto"},
    "dynamic-tree": {"executor": "lean", "tree": "dynamic", "tree_nodes": 4},
}


def _model():
    model = tiny_model(num_future_tokens=3)
    model.base.config.max_position_embeddings = 2 * LAST
    return model


class Meter:
    """Live bytes of Python, and live tensors, at two moments of a generation."""

    def __init__(self):
        self.marks = []

    def read(self, made):
        """Called after every forward, with the new tokens so far."""
        if len(self.marks) < 2 and made >= (FIRST, LAST - 8)[len(self.marks)]:
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            self.marks.append((made, tracemalloc.get_traced_memory()[0], tensors))

    @property
    def bytes_per_token(self):
        (first, before, _), (last, after, _) = self.marks
        return (after - before) / (last - first)

    @property
    def tensors(self):
        return self.marks[1][2] - self.marks[0][2]


@pytest.fixture
def meter():
    tracemalloc.start(1)
    try:
        yield Meter()
    finally:
        tracemalloc.stop()


def _follow(meter, **options):
    model = _model()
    loop = ENGINE.start(
        model, torch.arange(8)[None] % VOCABULARY, max_new_tokens=LAST, do_sample=True, top_k=0, seed=0, **options
    )
    made = 0
    with decoding_context(model):
        while not loop.finished:
            made += len(loop.step()[0])
            meter.read(made)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_leaves_no_more_than_itself_and_its_counts(way, meter):
    _follow(meter, **WAYS[way])
    assert meter.bytes_per_token < MOST_BYTES
    # Not one tensor per token, however small: at most a few that a longer block needed first.
    assert abs(meter.tensors) < 20


def test_the_index_of_copies_is_a_constant_number_of_bytes_per_token(meter):
    _follow(meter, executor="lean", drafts="lookup")
    # A text without repetitions enters `lookup_ngram` new n-grams with every token.
    assert meter.bytes_per_token < 2 * MOST_BYTES
    assert abs(meter.tensors) < 20


def test_a_request_of_the_scheduler_is_no_dearer(meter):
    scheduler = Scheduler(_model(), max_rows=2, executor="lean")
    handle = scheduler.submit(Request(prompt=(1, 2, 3), max_new_tokens=LAST, temperature=1.0, seed=0))
    made = 0
    while not handle.finished:
        made += sum(len(emitted.tokens) for emitted in scheduler.step().emitted)
        meter.read(made)
    assert meter.bytes_per_token < MOST_BYTES
    assert abs(meter.tensors) < 20
