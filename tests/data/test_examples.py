import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.loader import PackedLoader, held_out_windows
from headway.data.mixture import pack_rows
from headway.data.packing import PackedTokens
from headway.data.sources import Document
from headway.data.token_cache import TokenCache, build_token_cache
from headway.data.tokenizers import byte_tokenizer, train_bpe_tokenizer
from headway.data.whole_documents import PackedDocuments
from headway.errors import ConfigError, DataError
from headway.functional.targets import shift_targets

EXAMPLES = st.lists(st.tuples(st.binary(max_size=14), st.binary(min_size=1, max_size=14)), min_size=1, max_size=8)


def examples(pairs):
    return [
        Document(f"{number}", "g", prompt + completion, prompt_bytes=len(prompt))
        for number, (prompt, completion) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def built(pairs):
        return build_token_cache(examples(pairs), byte_tokenizer(), tmp_path_factory.mktemp("examples") / "cache")

    return built


def by_document(sample):
    """(ids, labels) of each document of a row, the filling left out."""
    parts = []
    for number in np.unique(sample.document_ids_T):
        chosen = sample.document_ids_T == number
        parts.append((sample.input_ids_T[chosen].tolist(), sample.labels_T[chosen].tolist()))
        assert sample.position_ids_T[chosen].tolist() == [*range(chosen.sum())]
    return parts


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(30, 60), st.integers(0, 3))
def test_whole_examples_share_rows_and_every_one_appears_once(build, pairs, length, epoch):
    cache = build(pairs)
    if cache.prompt_lengths is None:
        return
    rows = PackedDocuments(cache, sequence_length=length, seed=1)
    found = []
    for index in range(len(rows)):
        for ids, labels in by_document(rows.sample(index, epoch)):
            if any(label != -100 for label in labels):
                found.append((ids, labels))
    expected = []
    for prompt, completion in pairs:
        ids = [*prompt, *completion, 256]
        expected.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    assert sorted(found) == sorted(expected)
    assert rows.num_shortened == 0


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(2, 9))
def test_examples_longer_than_a_row_keep_their_completion_first(build, pairs, length):
    pairs = [*pairs, (b"pq", b"c")]
    cache = build(pairs)
    rows = PackedDocuments(cache, sequence_length=length, seed=1)
    shortened = 0
    for prompt, completion in pairs:
        ids = [*prompt, *completion, 256]
        if not prompt or len(ids) <= length:
            continue
        shortened += 1
        kept = max(length - len(completion) - 1, min(len(prompt), length // 2))
        row = ids[len(prompt) - kept :][:length]
        labels = [-100] * kept + row[kept:]
        assert (row, labels) in [part for index in range(len(rows)) for part in by_document(rows.window(index))]
    assert rows.num_shortened == shortened


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(3, 60))
def test_documents_without_a_prompt_lose_no_token(build, pairs, length):
    cache = build([(b"", completion) for _, completion in pairs] + [(b"p", b"c")])
    rows = PackedDocuments(cache, sequence_length=length, seed=0)
    learned = sum(int((rows.window(index).labels_T != -100).sum()) for index in range(len(rows)))
    assert learned == cache.num_tokens - 1


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(2, 20))
def test_windows_of_the_stream_ignore_prompts_too(build, pairs, length):
    cache = build(pairs)
    rows = PackedTokens(cache, sequence_length=length, seed=0)
    labels = np.concatenate([rows.window(index).labels_T for index in range(len(rows))])[: cache.num_tokens]
    expected = [label for prompt, completion in pairs for label in [*([-100] * len(prompt)), *completion, 256]]
    assert labels.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.integers(1, 5))
def test_targets_of_every_offset_that_fall_on_a_prompt_are_ignored(build, pairs, offset):
    cache = build([*pairs, (b"pq", b"c")])
    batch = PackedLoader(pack_rows(cache, sequence_length=40, seed=0), batch_size=1)
    for index in range(len(batch.packed)):
        row = batch.batch(index)
        targets = shift_targets(
            row.labels_BT,
            offset=offset,
            position_ids_BT=row.position_ids_BT,
            document_ids_BT=row.document_ids_BT,
        )
        for place in range(40):
            target = place + offset
            same = target < 40 and row.document_ids_BT[0, place] == row.document_ids_BT[0, min(target, 39)]
            if same and row.labels_BT[0, target] != -100:
                assert targets[0, place] == row.input_ids_BT[0, target]
            else:
                assert targets[0, place] == -100


def test_a_prompt_and_its_completion_are_encoded_apart(tmp_path):
    tokenizer = train_bpe_tokenizer([b"correct answer answers"] * 9, vocabulary_size=270)
    document = Document("a", "a", b"answeranswer", prompt_bytes=6)
    cache = build_token_cache([document, Document("b", "b", b"answer")], tokenizer, tmp_path / "cache")
    word = tokenizer("answer")["input_ids"]
    assert cache.tokens.tolist() == [*word, *word, 0, *word, 0]
    assert cache.prompt_lengths.tolist() == [len(word), 0]
    assert (cache.metadata.num_prompt_tokens, cache.metadata.num_prompt_bytes) == (len(word), 6)
    assert cache.bytes_per_token == 12 / (2 * len(word) + 2)
    again = TokenCache.open(cache.directory)
    assert again.prompt_lengths.tolist() == cache.prompt_lengths.tolist()
    (cache.directory / "prompts.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"prompts.npy was truncated"):
        TokenCache.open(cache.directory)


def test_held_out_windows_ignore_prompts(build):
    cache = build([(b"abc", b"de")] * 4)
    windows = held_out_windows(cache, sequence_length=6, max_windows=4)
    assert windows.labels_BT[0].tolist() == [-100, -100, -100, 100, 101, 256]
    assert torch.equal(windows.labels_BT[0], windows.labels_BT[3])


def test_rows_are_nearly_full(build):
    rng = np.random.default_rng(0)
    cache = build([(b"p" * int(size // 2), b"c" * int(size - size // 2)) for size in rng.integers(2, 60, 400)])
    rows = PackedDocuments(cache, sequence_length=128, seed=0)
    assert rows.filled_fraction > 0.97
    assert rows.filled_fraction == pytest.approx(cache.num_tokens / (len(rows) * 128))


def test_order_changes_by_seed_and_epoch_and_rows_do_not(build):
    cache = build([(b"p%d" % number, b"c" * 30) for number in range(40)])
    one, two = (PackedDocuments(cache, sequence_length=64, seed=seed) for seed in (0, 1))

    def order(rows, epoch):
        return [tuple(rows.sample(index, epoch).input_ids_T.tolist()) for index in range(len(rows))]

    assert order(one, 0) != order(one, 1)
    assert order(one, 0) != order(two, 0)
    assert sorted(order(one, 0)) == sorted(order(one, 1)) == sorted(order(two, 1))


def test_rows_that_cannot_be_are_refused(build):
    cache = build([(b"prompt", b"c")])
    with pytest.raises(ConfigError, match="at least 2"):
        PackedDocuments(cache, sequence_length=1, seed=0)
    with pytest.raises(IndexError, match=r"0\.\.0"):
        PackedDocuments(cache, sequence_length=8, seed=0).window(1)


def test_examples_of_a_file_become_rows_with_loss_on_completions_only(tmp_path, gather):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"p": f"{n}+{n}=", "c": f"{2 * n}", "r": n % 2 == 0}) + "\n" for n in range(9)))
    collection, _ = gather(f"{path}::prompt=p,completion=c,reward=r")
    cache = build_token_cache(collection, byte_tokenizer(), tmp_path / "cache")
    rows = pack_rows(cache, sequence_length=64, seed=0)
    assert isinstance(rows, PackedDocuments)
    text = bytes(rows.window(0).input_ids_T[rows.window(0).document_ids_T == 0][:-1].tolist())
    assert text == b"correct\n0+0=0"
    assert (rows.window(0).labels_T[rows.window(0).document_ids_T == 0] != -100).tolist() == [False] * 12 + [True] * 2
