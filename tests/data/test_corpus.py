import dataclasses
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from headway.data import corpus as corpus_module
from headway.data.corpus import prepare_corpus
from headway.data.corpus_spec import CorpusSpec
from headway.data.mixture import Mixture
from headway.data.source_spec import parse_source
from headway.data.sources import iter_files
from headway.data.split import split_by_group
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import byte_tokenizer, integer_tokenizer, load_tokenizer
from headway.data.whole_documents import PackedDocuments
from headway.errors import ConfigError, DataError


def words(start, count=60):
    return " ".join(f"w{number}" for number in range(start, start + count)).encode()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    for number in range(20):
        (root / f"g{number}").mkdir(parents=True)
        (root / f"g{number}/a.txt").write_bytes(words(1000 * number))
    return root


@pytest.fixture
def prepare(tmp_path):
    def prepared(*lines, held_out=(), notices=None, tokenizer=None, **options):
        spec = CorpusSpec(
            sources=tuple(parse_source(line) for line in lines),
            held_out=tuple(parse_source(line) for line in held_out),
            **options,
        )
        notice = (lambda text: None) if notices is None else notices.append
        return prepare_corpus(spec, tokenizer or byte_tokenizer(), tmp_path / "caches", notice=notice)

    return prepared


def text_of(cache):
    return [bytes(row[:-1].tolist()) for row in np.split(cache.tokens, cache.document_offsets[1:-1])]


def test_a_corpus_is_split_deduplicated_and_encoded(folder, prepare, tokenizer, tmp_path):
    notices = []
    corpus = prepare(str(folder), held_out_fraction=0.2, split_seed=3, notices=notices)
    split = split_by_group(iter_files(folder), held_out_fraction=0.2, seed=3)
    expected = build_token_cache(split.train, tokenizer, tmp_path / "expected")
    (part,) = corpus.parts
    assert part.cache.metadata == expected.metadata
    assert corpus.fingerprint == expected.fingerprint
    assert text_of(corpus.held_out) == [document.data for document in split.held_out]
    assert notices == [f"{folder}: 20 documents, 0.01 MB", split.describe()]
    assert corpus.num_tokens == expected.num_tokens


def test_a_file_alone_trains_with_explicit_held_out_text_and_says_so_without(tmp_path, prepare):
    (tmp_path / "all.txt").write_bytes(words(0, 500))
    (tmp_path / "held.txt").write_bytes(words(9000))
    with pytest.raises(DataError, match=r"name the held-out text explicitly \(held_out"):
        prepare(str(tmp_path / "all.txt"), held_out_fraction=0.1)
    notices = []
    line = str(tmp_path / "all.txt")
    corpus = prepare(line, held_out=[str(tmp_path / "held.txt")], held_out_fraction=0.1, notices=notices)
    assert text_of(corpus.parts[0].cache) == [words(0, 500)]
    assert text_of(corpus.held_out) == [words(9000)]
    assert notices[1].startswith("held out: ")
    assert prepare(line).held_out is None


def test_held_out_text_is_never_trained_on(folder, prepare):
    copied = folder / "g7/copy.txt"
    copied.write_bytes(words(2000) + b" and more")
    notices = []
    corpus = prepare(str(folder), held_out=[str(folder / "g2")], notices=notices)
    assert words(2000) not in text_of(corpus.parts[0].cache)
    assert words(2000) + b" and more" not in text_of(corpus.parts[0].cache)
    assert text_of(corpus.held_out) == [words(2000)]
    assert "1 met before" in notices[0] or "1 met before" in notices[1]
    assert "1 training document dropped as near-duplicate of held-out text ('g7/copy.txt'" in notices[-1]
    kept = prepare(str(folder), held_out=[str(folder / "g2")], drop_near_duplicates=False)
    assert words(2000) + b" and more" in text_of(kept.parts[0].cache)
    with pytest.raises(DataError, match="no text in"):
        prepare(str(folder), held_out=[str(folder)])
    copied.unlink()
    (folder.parent / "again.txt").write_bytes(words(2000))
    with pytest.raises(DataError, match="no document is left to train on"):
        prepare(str(folder / "g2"), held_out=[str(folder.parent / "again.txt")])


def test_the_same_corpus_is_found_again_without_reading_the_text(folder, prepare, monkeypatch):
    first_notices, notices = [], []
    first = prepare(str(folder), held_out_fraction=0.2, notices=first_notices)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "collect", lambda *_, **__: pytest.fail("read again"))
        again = prepare(str(folder), held_out_fraction=0.2, notices=notices)
        assert again.fingerprint == first.fingerprint
        assert again.held_out.fingerprint == first.held_out.fingerprint
        assert notices == first_notices
        for change in ({"held_out_fraction": 0.3}, {"held_out_fraction": 0.2, "split_seed": 1}):
            with pytest.raises(pytest.fail.Exception):
                prepare(str(folder), **change)
        with pytest.raises(pytest.fail.Exception):
            prepare(str(folder), held_out_fraction=0.2, tokenizer=integer_tokenizer(300))


def test_changed_text_is_read_again_and_touched_text_is_not_encoded_again(folder, prepare, monkeypatch):
    first = prepare(str(folder), held_out_fraction=0.2)
    path = folder / "g3/a.txt"
    os.utime(path, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("headway.data.token_cache._write", lambda *_: pytest.fail("encoded again"))
        assert prepare(str(folder), held_out_fraction=0.2).fingerprint == first.fingerprint
    path.write_bytes(words(77_000))
    changed = prepare(str(folder), held_out_fraction=0.2)
    assert (changed.fingerprint, changed.held_out.fingerprint) != (first.fingerprint, first.held_out.fingerprint)
    (folder / "g3/new.txt").write_bytes(words(88_000))
    assert prepare(str(folder), held_out_fraction=0.2).num_tokens > 0


def test_a_cache_that_was_deleted_is_built_again(folder, prepare, tmp_path):
    import shutil

    first = prepare(str(folder), held_out_fraction=0.2)
    shutil.rmtree(first.held_out.directory)
    assert prepare(str(folder), held_out_fraction=0.2).held_out.fingerprint == first.held_out.fingerprint
    shutil.rmtree(first.parts[0].cache.directory)
    assert prepare(str(folder), held_out_fraction=0.2).fingerprint == first.fingerprint


def test_weights_make_a_mixture_and_no_weights_make_one_stream(folder, tmp_path, prepare):
    records = "".join(json.dumps({"body": words(number, 30).decode()}) + "\n" for number in range(50_000, 50_900, 30))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    lines = [str(folder), f"{tmp_path}/r.jsonl.gz::field=body"]
    one = prepare(*lines, held_out_fraction=0.1)
    assert len(one.parts) == 1
    notices = []
    mixed = prepare(f"{lines[0]}::weight=3", f"{lines[1]},weight=1", held_out_fraction=0.1, notices=notices)
    assert [(part.name, part.weight) for part in mixed.parts] == [("text", 3.0), ("r.jsonl.gz", 1.0)]
    assert mixed.num_tokens == one.num_tokens
    assert mixed.held_out.fingerprint == one.held_out.fingerprint
    rows = mixed.rows(sequence_length=16, seed=0)
    assert isinstance(rows, Mixture)
    assert rows.counts == (3, 1)
    again = prepare(f"{lines[0]}::weight=6", f"{lines[1]},weight=2", held_out_fraction=0.1)
    other = prepare(f"{lines[0]}::weight=1", f"{lines[1]},weight=1", held_out_fraction=0.1)
    assert again.fingerprint == mixed.fingerprint != other.fingerprint != one.fingerprint
    assert [part.cache.directory for part in other.parts] == [part.cache.directory for part in mixed.parts]


def test_mixtures_that_cannot_be_are_refused(folder, prepare):
    with pytest.raises(ConfigError, match=r"every source of a mixture needs a weight: .*g1' has none"):
        prepare(f"{folder}/g0::weight=1", f"{folder}/g1")
    with pytest.raises(ConfigError, match="held-out text is not mixed"):
        prepare(f"{folder}/g0", held_out=[f"{folder}/g1::weight=1"])
    with pytest.raises(ConfigError, match="too small"):
        prepare(f"{folder}/g0::weight=1", f"{folder}/g1::weight=1e-9")
    (folder / "copy.txt").write_bytes(words(5000))
    with pytest.raises(DataError, match=r"nothing of the source .*copy.txt.* is left to train on"):
        prepare(f"{folder}/g0::weight=1", f"{folder}/copy.txt::weight=1", held_out=[f"{folder}/g5"])
    with pytest.raises(DataError, match="at least one source"):
        prepare()


def test_examples_become_rows_of_whole_examples(tmp_path, prepare):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"{n}+1=", "a": f"{n + 1}"}) + "\n" for n in range(200)))
    corpus = prepare(f"{path}::prompt=q,completion=a", held_out_fraction=0.1)
    rows = corpus.rows(sequence_length=32, seed=0)
    assert isinstance(rows, PackedDocuments)
    assert corpus.held_out.prompt_lengths is not None
    assert corpus.parts[0].cache.num_documents + corpus.held_out.num_documents == 200


def test_ids_of_another_modality_train_without_text(tmp_path, prepare):
    tokenizer = load_tokenizer("integers:512")
    np.save(tmp_path / "codes.npy", np.random.default_rng(0).integers(0, 512, (40, 30)))
    corpus = prepare(str(tmp_path / "codes.npy"), held_out_fraction=0.2, tokenizer=tokenizer)
    cache = corpus.parts[0].cache
    assert cache.bytes_per_token is None
    assert cache.metadata.vocabulary_size == 514
    assert cache.num_documents + corpus.held_out.num_documents == 40
    assert (np.diff(cache.document_offsets) == 31).all()
    assert (np.asarray(cache.tokens)[cache.document_offsets[1:] - 1] == 512).all()
    assert tokenizer.decode(cache.tokens[:3].tolist()) == " ".join(map(str, cache.tokens[:3].tolist()))


def test_ids_and_text_made_by_the_same_tokenizer_are_the_same_tokens(tmp_path, prepare, tokenizer):
    texts = [b"first text", b"second", b"third one"]
    stream = np.concatenate([np.append(np.frombuffer(text, np.uint8).astype("<u2"), 256) for text in texts])
    stream.astype("<u2").tofile(tmp_path / "tokens.bin")
    for number, text in enumerate(texts):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{number}.txt").write_bytes(text)
    ids = prepare(f"{tmp_path}/tokens.bin::dtype=uint16").parts[0].cache
    text = prepare(f"{tmp_path}/text").parts[0].cache
    assert ids.tokens.tolist() == text.tokens.tolist()
    assert ids.document_offsets.tolist() == text.document_offsets.tolist()
    assert ids.metadata.data_fingerprint != text.metadata.data_fingerprint


def test_a_folder_that_cannot_be_written_any_more_still_serves(folder, prepare, monkeypatch):
    first = prepare(str(folder), held_out_fraction=0.2)
    for path in first.parts[0].cache.directory.glob("corpus-*"):
        path.unlink()
    write = Path.write_text

    def refuse(path, *args, **options):
        if "corpus-" in path.name:
            raise PermissionError(13, "Permission denied")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", refuse)
    notices = []
    assert prepare(str(folder), held_out_fraction=0.2, notices=notices).fingerprint == first.fingerprint
    assert "could not be written" in notices[-1]


def test_the_spec_is_checked_before_anything_is_read():
    spec = CorpusSpec(sources=(parse_source("nowhere"),))
    assert not spec.is_mixture
    assert dataclasses.replace(spec, sources=(parse_source("a::weight=1"), parse_source("b::weight=2"))).is_mixture
    without = byte_tokenizer()
    without.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        prepare_corpus(spec, without, Path("nowhere"))


def test_what_a_killed_build_of_former_text_left_is_removed_after_a_week(folder, prepare, tmp_path):
    caches = tmp_path / "caches"
    for name in (".0123456789abcdef.partial", ".0123456789abcdea.partial", ".mine.partial"):
        (caches / name).mkdir(parents=True)
        (caches / name / "tokens.bin").write_bytes(b"x")
    week = 8 * 86400
    for name in (".0123456789abcdef.partial", ".mine.partial"):
        os.utime(caches / name, (time.time() - week, time.time() - week))
    prepare(str(folder))
    hidden = sorted(path.name for path in caches.glob(".*"))
    assert hidden == [".0123456789abcdea.partial", ".mine.partial"]
