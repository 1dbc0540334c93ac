import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.packing import PackedTokens
from headway.data.sources import Document
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer
from headway.errors import ConfigError
from headway.functional.targets import shift_targets

TEXTS = st.lists(st.binary(max_size=12), min_size=1, max_size=6)
LENGTHS = st.integers(2, 15)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A cache of texts, and for every token of its stream the document it is in and its place there."""

    def built(texts):
        documents = [Document(f"{number}", "g", text) for number, text in enumerate(texts)]
        cache = build_token_cache(documents, byte_tokenizer(), tmp_path_factory.mktemp("packing") / "cache")
        where = [(number, place) for number, text in enumerate(texts) for place in range(len(text) + 1)]
        return cache, where

    return built


@settings(max_examples=60, deadline=None)
@given(TEXTS, LENGTHS, st.integers(0, 3))
def test_an_epoch_holds_every_token_exactly_once(build, texts, length, epoch):
    cache, _ = build(texts)
    packed = PackedTokens(cache, sequence_length=length, seed=5)
    windows = [packed.window(index) for index in range(len(packed))]
    stream = [token for window in windows for token in window.labels_T[window.labels_T != -100]]
    assert stream == cache.tokens.tolist()
    assert all(
        (window.input_ids_T[window.labels_T != -100] == window.labels_T[window.labels_T != -100]).all()
        for window in windows
    )
    shuffled = sorted(packed.sample(index, epoch).input_ids_T.tolist() for index in range(len(packed)))
    assert shuffled == sorted(window.input_ids_T.tolist() for window in windows)


@settings(max_examples=60, deadline=None)
@given(TEXTS, LENGTHS)
def test_positions_restart_exactly_at_document_and_window_starts(build, texts, length):
    cache, where = build(texts)
    packed = PackedTokens(cache, sequence_length=length, seed=0)
    for index in range(len(packed)):
        window = packed.window(index)
        inside = where[index * length : (index + 1) * length]
        first_document, first_place = inside[0]
        expected = [place - first_place if document == first_document else place for document, place in inside]
        assert window.position_ids_T[: len(inside)].tolist() == expected
        assert window.document_ids_T[: len(inside)].tolist() == [document - first_document for document, _ in inside]
        # the filling is a document of its own
        filling = length - len(inside)
        assert window.position_ids_T[len(inside) :].tolist() == [*range(filling)]
        assert (window.document_ids_T[len(inside) :] == window.document_ids_T[len(inside) - 1] + 1).all()
        assert (window.labels_T[len(inside) :] == -100).all()
        assert (window.input_ids_T[len(inside) :] == 256).all()


@settings(max_examples=60, deadline=None)
@given(TEXTS, LENGTHS, st.integers(1, 5), st.sampled_from(["positions", "documents"]))
def test_no_target_crosses_a_document(build, texts, length, offset, by):
    cache, where = build(texts)
    packed = PackedTokens(cache, sequence_length=length, seed=0)
    for index in range(len(packed)):
        window = packed.window(index)
        ids = {
            "positions": {"position_ids_BT": torch.from_numpy(window.position_ids_T)[None]},
            "documents": {"document_ids_BT": torch.from_numpy(window.document_ids_T)[None]},
        }[by]
        targets = shift_targets(torch.from_numpy(window.labels_T)[None], offset=offset, **ids)[0].tolist()
        inside = where[index * length : (index + 1) * length]
        stream = cache.tokens[index * length : (index + 1) * length].tolist()
        expected = [
            stream[place + offset] if place + offset < len(inside) and inside[place + offset][0] == document else -100
            for place, (document, _) in enumerate(inside)
        ]
        assert targets == expected + [-100] * (length - len(inside))


def test_the_order_is_a_function_of_seed_epoch_and_index(build):
    cache, _ = build([bytes(range(200))])
    packed = PackedTokens(cache, sequence_length=4, seed=1)
    again = PackedTokens(cache, sequence_length=4, seed=1)
    other = PackedTokens(cache, sequence_length=4, seed=2)

    def order(source, epoch):
        return [int(source.sample(index, epoch).input_ids_T[0]) for index in range(len(source))]

    assert order(packed, 0) == order(again, 0)
    assert len({tuple(order(source, epoch)) for source in (packed, other) for epoch in range(3)}) == 6
    assert packed.sample(3, 2).input_ids_T.tolist() == again.sample(3, 2).input_ids_T.tolist()


def test_a_corpus_shorter_than_a_window_is_one_window(build):
    cache, _ = build([b"ab"])
    packed = PackedTokens(cache, sequence_length=6, seed=0)
    assert len(packed) == 1
    window = packed.sample(0, epoch=9)
    assert window.input_ids_T.tolist() == [97, 98, 256, 256, 256, 256]
    assert window.labels_T.tolist() == [97, 98, 256, -100, -100, -100]
    assert window.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert window.document_ids_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert {array.dtype for array in vars(window).values()} == {np.dtype(np.int64)}


def test_indices_and_lengths_out_of_range_are_refused(build):
    cache, _ = build([b"abcdef"])
    packed = PackedTokens(cache, sequence_length=3, seed=0)
    for call in (packed.window, lambda index: packed.sample(index, 0)):
        for index in (-1, 3):
            with pytest.raises(IndexError):
                call(index)
    with pytest.raises(ConfigError, match="at least 2"):
        PackedTokens(cache, sequence_length=1, seed=0)
