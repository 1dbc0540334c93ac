import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from headway.data import token_cache
from headway.data.fingerprint import data_fingerprint
from headway.data.sources import Document
from headway.data.token_cache import TokenCache, build_token_cache
from headway.data.tokenizers import byte_tokenizer, encode_bytes, train_bpe_tokenizer
from headway.errors import DataError

DOCUMENTS = [
    Document("a.py", "a", b"first\n"),
    Document("b/c.py", "b", b"caf\xe9\0<|endoftext|>"),
    Document("d", "d", b""),
]


@pytest.fixture
def cache(tmp_path, tokenizer):
    return build_token_cache(DOCUMENTS, tokenizer, tmp_path / "deep" / "cache")


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_stream_is_every_document_and_its_end(cache):
    expected = np.concatenate([np.append(encode_bytes(document.data), 256) for document in DOCUMENTS])
    assert cache.tokens.tolist() == expected.tolist()
    assert cache.tokens.dtype == np.uint16
    assert cache.document_offsets.tolist() == [0, 7, 26, 27]
    assert (cache.num_tokens, cache.num_documents, cache.metadata.num_bytes) == (27, 3, 24)
    assert cache.bytes_per_token == 24 / 27
    assert cache.metadata.num_undecodable == 0
    assert not cache.tokens.flags.writeable


def test_nothing_but_the_three_files_is_left_and_no_path_is_in_them(cache, tmp_path):
    assert entries(cache.directory.parent) == ["cache"]
    assert entries(cache.directory) == ["documents.npy", "metadata.json", "tokens.bin"]
    assert str(tmp_path) not in (cache.directory / "metadata.json").read_text()


def test_an_equal_text_elsewhere_has_an_equal_cache(cache, tmp_path, tokenizer):
    other = build_token_cache(iter(DOCUMENTS), byte_tokenizer(), tmp_path / "other")
    for name in entries(cache.directory):
        assert (other.directory / name).read_bytes() == (cache.directory / name).read_bytes()
    assert other.fingerprint == cache.fingerprint


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5))
def test_any_bytes_come_back_from_the_cache(tmp_path_factory, texts):
    documents = [Document(f"{number}", "g", text) for number, text in enumerate(texts)]
    cache = build_token_cache(documents, byte_tokenizer(), tmp_path_factory.mktemp("any") / "cache")
    starts = cache.document_offsets
    back = [bytes(cache.tokens[start : stop - 1].tolist()) for start, stop in itertools.pairwise(starts)]
    assert back == texts
    assert (cache.tokens[starts[1:] - 1] == 256).all()


def test_a_bpe_cache_counts_what_it_had_to_replace(tmp_path):
    tokenizer = train_bpe_tokenizer([b"text and text again"], vocabulary_size=260)
    cache = build_token_cache(DOCUMENTS, tokenizer, tmp_path / "cache")
    starts = cache.document_offsets
    texts = [tokenizer.decode(cache.tokens[starts[i] : starts[i + 1] - 1]) for i in range(3)]
    assert texts == ["first\n", "caf\ufffd\0<|endoftext|>", ""]
    assert cache.metadata.num_undecodable == 1
    assert (cache.tokens == tokenizer.eos_token_id).sum() == 3


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {f"t{number}": number for number in range(70_000)}
    model = models.WordLevel(vocab=vocabulary, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="t69999")
    cache = build_token_cache([Document("a", "a", b"t65536")], tokenizer, tmp_path / "cache")
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens.tolist() == [65536, 69999]


def test_the_same_again_is_reused_and_not_encoded(cache, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_write", lambda *_: pytest.fail("encoded again"))
    for documents in (DOCUMENTS, iter(DOCUMENTS)):
        for overwrite in (False, True):
            again = build_token_cache(documents, tokenizer, cache.directory, overwrite=overwrite)
            assert again.fingerprint == cache.fingerprint
            documents = [*DOCUMENTS]


@pytest.mark.parametrize(
    ("documents", "changed"),
    [
        ([*DOCUMENTS, Document("e", "e", b"x")], "another text;"),
        (DOCUMENTS[::-1], "another text;"),
        ([Document("renamed", "a", DOCUMENTS[0].data), *DOCUMENTS[1:]], "another text;"),
    ],
)
def test_other_text_is_refused_by_name_unless_overwriting(cache, tokenizer, documents, changed):
    with pytest.raises(DataError, match=f"{changed} name another folder, or pass overwrite"):
        build_token_cache(documents, tokenizer, cache.directory)
    assert TokenCache.open(cache.directory).fingerprint == cache.fingerprint
    new = build_token_cache(iter(documents), tokenizer, cache.directory, overwrite=True)
    assert new.fingerprint != cache.fingerprint
    assert new.num_documents == len(documents)
    assert entries(cache.directory.parent) == ["cache"]


def test_another_tokenizer_is_refused_by_name(cache):
    bpe = train_bpe_tokenizer([b"text"], vocabulary_size=258)
    with pytest.raises(DataError, match="another tokenizer; name another folder"):
        build_token_cache(DOCUMENTS, bpe, cache.directory)
    with pytest.raises(DataError, match="another text and another tokenizer"):
        build_token_cache(DOCUMENTS[:1], bpe, cache.directory)


def test_overwriting_never_removes_files_of_others(tmp_path, tokenizer):
    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("words")
    for target in (precious.parent, precious):
        with pytest.raises(DataError, match="something else than a token cache"):
            build_token_cache(DOCUMENTS, tokenizer, target, overwrite=True)
    assert precious.read_text() == "words"
    assert entries(tmp_path) == ["thesis"]


def test_an_empty_folder_is_filled(tmp_path, tokenizer):
    (tmp_path / "cache").mkdir()
    assert build_token_cache(DOCUMENTS, tokenizer, tmp_path / "cache").num_documents == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, lengthen, empty, remove])
@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy"])
def test_damaged_files_are_one_clear_error_each_and_can_be_rebuilt(cache, tokenizer, name, damage):
    damage(cache.directory / name)
    with pytest.raises(DataError, match=f"is damaged .{name}.*build it anew with overwrite"):
        TokenCache.open(cache.directory)
    with pytest.raises(DataError, match="is damaged"):
        build_token_cache(DOCUMENTS, tokenizer, cache.directory)
    assert build_token_cache(DOCUMENTS, tokenizer, cache.directory, overwrite=True).num_documents == 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("tokens.bin", damage) for damage in (truncate, lengthen, empty, remove)),
        *(("documents.npy", damage) for damage in (truncate, empty, remove)),
    ],
)
def test_wrong_lengths_are_seen_without_reading_everything(cache, name, damage):
    damage(cache.directory / name)
    with pytest.raises(DataError, match="is damaged"):
        TokenCache.open(cache.directory, verify=False)


def test_offsets_that_do_not_fit_the_tokens_are_seen(cache):
    for offsets in ([0, 7, 27], [1, 7, 26, 27], [0, 7, 26, 28], [[0, 7, 26, 27]]):
        with (cache.directory / "documents.npy").open("wb") as file:
            np.save(file, np.array(offsets))
        with pytest.raises(DataError, match="does not describe 3 documents"):
            TokenCache.open(cache.directory, verify=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[]", "not of a token cache"),
        ('{"format": "headway-token-cache", "version": 2}', "version 2, this headway reads 1; build it anew"),
        ('{"format": "headway-token-cache", "version": 1}', "does not have the fields"),
    ],
)
def test_metadata_that_cannot_be_used_is_one_clear_error(cache, text, message):
    (cache.directory / "metadata.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        TokenCache.open(cache.directory)


@pytest.mark.parametrize("change", [{"dtype": "<f8"}, {"num_tokens": True}, {"num_tokens": "27"}, {"dtype": "object"}])
def test_metadata_of_wrong_kinds_is_refused(cache, change):
    path = cache.directory / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is damaged"):
        TokenCache.open(cache.directory)


def test_a_folder_without_a_cache_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no token cache at .*build it first"):
        TokenCache.open(tmp_path / "missing")


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path, tokenizer):
    def broken():
        yield DOCUMENTS[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        build_token_cache(broken(), tokenizer, tmp_path / "cache")
    assert entries(tmp_path) == []


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "_to_disk", full)
    with pytest.raises(DataError, match=r"No space left on device.*free some space or name another folder"):
        build_token_cache(DOCUMENTS, tokenizer, tmp_path / "cache")
    assert entries(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="could not be written"):
        build_token_cache(DOCUMENTS, tokenizer, tmp_path / "file" / "cache")


def test_no_documents_and_no_end_token_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="at least one document"):
        build_token_cache([], tokenizer, tmp_path / "cache")
    without = byte_tokenizer()
    without.eos_token = None
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token"):
        build_token_cache(DOCUMENTS, without, tmp_path / "cache")
    assert entries(tmp_path) == []


def test_two_builders_at_once_end_with_one_cache(tmp_path, tokenizer):
    target = tmp_path / "cache"

    def documents():
        yield from DOCUMENTS
        build_token_cache(DOCUMENTS, tokenizer, target)  # the other one is faster

    assert build_token_cache(documents(), tokenizer, target).num_documents == 3
    assert entries(tmp_path) == ["cache"]


def test_progress_counts_the_bytes_encoded(tmp_path, tokenizer):
    seen = []
    documents = [Document(f"{number}", "g", b"x" * 700_000) for number in range(4)]
    build_token_cache(documents, tokenizer, tmp_path / "cache", progress=seen.append)
    assert seen == [1_400_000, 2_800_000]


def test_pickling_sends_the_folder_not_the_tokens(cache):
    content = pickle.dumps(cache)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.tokens.tolist() == cache.tokens.tolist()
    assert again.metadata == cache.metadata


def test_the_fingerprint_separates_names_from_bytes():
    one = data_fingerprint([Document("ab", "g", b"c")])
    assert one != data_fingerprint([Document("a", "g", b"bc")])
    assert one == data_fingerprint([Document("ab", "other group", b"c")])


def test_a_killed_builder_leaves_nothing_that_looks_like_a_cache(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from headway.data.sources import Document\n"
        "from headway.data.token_cache import build_token_cache\n"
        "from headway.data.tokenizers import byte_tokenizer\n"
        "def documents():\n"
        "    yield Document('a', 'a', b'x' * 5_000_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_token_cache(documents(), byte_tokenizer(), sys.argv[1])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "cache")], check=False)
    assert ended.returncode == -9
    assert not (tmp_path / "cache").exists()
    assert [name.endswith(".partial") for name in entries(tmp_path)] == [True]
    assert build_token_cache(DOCUMENTS, byte_tokenizer(), tmp_path / "cache").num_documents == 3
