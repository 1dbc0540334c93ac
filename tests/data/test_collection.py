import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.document import Document
from headway.data.fingerprint import data_fingerprint
from headway.data.near_duplicates import drop_near_duplicates
from headway.data.pieces import split_into_pieces, stream_pieces
from headway.data.sources import iter_files, standard_library
from headway.data.split import split_by_group
from headway.data.token_cache import build_token_cache
from headway.errors import DataError


class Trickle:
    """A file that gives less than it is asked for."""

    def __init__(self, data, steps):
        self.data, self.steps, self.at, self.calls = data, steps, 0, 0

    def read(self, size, /):
        step = min(size, self.steps[self.calls % len(self.steps)])
        self.calls += 1
        part = self.data[self.at : self.at + step]
        self.at += len(part)
        return part


@given(st.binary(max_size=60), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_a_stream_is_cut_exactly_like_a_text(data, max_bytes, steps):
    pieces = [*stream_pieces(Trickle(data, steps), max_bytes=max_bytes)]
    assert pieces == [*split_into_pieces(data, max_bytes=max_bytes)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    for number in range(12):
        path = root / f"g{number % 4}" / f"f{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"word%d " % number * (number * 40_000 + 1))
    return root


def test_documents_on_disk_equal_documents_in_memory(folder, gather):
    collection, (report,) = gather(folder)
    documents = [*iter_files(folder)]
    assert [*collection] == documents
    assert [document.group for document in collection] == [document.group for document in documents]
    assert [document.num_bytes for document in collection] == [len(document.data) for document in documents]
    assert data_fingerprint(collection) == data_fingerprint(documents)
    assert collection.num_bytes == report.num_bytes
    assert [document.sha256() for document in collection] == [document.sha256() for document in documents]
    assert collection[-1] == documents[-1]
    assert [*collection[3:5]] == documents[3:5]
    assert repr(collection[0]) == "Document('g0/f0.txt', 'g0', 6 bytes)"


def test_the_standard_library_on_disk_is_the_standard_library(gather):
    assert data_fingerprint(gather("stdlib")[0]) == data_fingerprint(standard_library())


def test_splitting_and_deduplicating_on_disk_is_the_same_as_in_memory(folder, gather):
    (folder / "g9").mkdir()
    (folder / "g9/copy.txt").write_bytes((folder / "g0/f4.txt").read_bytes())
    collection, documents = gather(folder)[0], [*iter_files(folder)]
    split, expected = (split_by_group(each, held_out_fraction=0.3, seed=1) for each in (collection, documents))
    assert [*split.train] == expected.train
    assert [*split.held_out] == expected.held_out
    assert split.describe() == expected.describe()
    report, expected = (drop_near_duplicates(each, [documents[1]]) for each in (collection, documents))
    assert [*report.kept] == expected.kept
    assert report.dropped == expected.dropped
    assert len(report.dropped) > 0


def test_a_cache_from_disk_equals_one_from_memory(folder, gather, tokenizer, tmp_path):
    one = build_token_cache(gather(folder)[0], tokenizer, tmp_path / "one")
    two = build_token_cache(iter_files(folder), tokenizer, tmp_path / "two")
    assert one.metadata == two.metadata


def test_parts_of_a_collection_keep_order_and_sources(folder, gather):
    collection, _ = gather(f"{folder}/g1", f"{folder}/g2", "stdlib")
    assert [document.name for document in collection.of_source(1)] == ["g2/f10.txt", "g2/f2.txt", "g2/f6.txt"]
    every_other = collection.take(np.arange(len(collection)) % 2 == 0)
    assert [document.name for document in every_other] == [document.name for document in collection][::2]
    assert {document.name.split("/")[0] for document in every_other.of_source(2)} == {"stdlib"}
    assert len(collection.of_source(0)) + len(collection.of_source(1)) + len(collection.of_source(2)) == len(collection)


def test_text_that_changes_after_it_was_read_is_noticed(folder, gather):
    collection, _ = gather(folder)
    path = folder / "g1/f1.txt"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(DataError, match=r"'g1/f1.txt' changed while it was read"):
        _ = [document.data for document in collection]
    path.unlink()
    with pytest.raises(DataError, match=r"'g1/f1.txt' cannot be read any more \(no such file"):
        _ = [document.data for document in collection]


def test_records_that_change_after_they_were_read_are_noticed(tmp_path, gather):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    collection, _ = gather(path)
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "six"}) + "\n")
    assert collection[0].data == b"one"
    with pytest.raises(DataError, match="changed while"):
        _ = collection[1].data
    path.write_text("{}\n")
    collection.close()
    with pytest.raises(DataError, match=r"changed while|became shorter"):
        _ = collection[1].data


def test_a_collection_is_pickled_by_its_files(tmp_path, gather):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"t{number}"}) + "\n" for number in range(5)))
    collection, _ = gather(tmp_path / "a.jsonl")
    _ = collection[2].data
    assert [document.data for document in pickle.loads(pickle.dumps(collection))] == [
        f"t{number}".encode() for number in range(5)
    ]


@settings(max_examples=20)
@given(texts=st.lists(st.text(), min_size=1, max_size=6), order=st.randoms())
def test_any_text_comes_back_from_a_record_in_any_order(tmp_path_factory, texts, order):
    from headway.data.collect import collect, open_sources
    from headway.data.formats.token_file import TokenRules
    from headway.data.source_spec import SourceSpec

    path = tmp_path_factory.mktemp("records") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "end"]))
    sources = open_sources(
        [SourceSpec(path=str(path))], token_rules=TokenRules(256, 258), stream_directory=path.parent / "streams"
    )
    collection = collect(sources)
    expected = [text.encode() for text in [*texts, "end"] if text]
    numbers = [*range(len(expected))]
    order.shuffle(numbers)
    assert [collection[number].data for number in numbers] == [expected[number] for number in numbers]


def test_equality_is_by_content():
    one = Document("a", "g", b"x", prompt_bytes=1)
    assert one == Document("a", "g", b"x", prompt_bytes=1)
    assert one != Document("a", "g", b"x")
    assert one != Document("a", "g", b"x", prompt_bytes=1, is_tokens=True)
    assert len({one, Document("a", "g", b"x", prompt_bytes=1)}) == 1
    assert data_fingerprint([one]) != data_fingerprint([Document("a", "g", b"x")])


MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
from headway.data.corpus import prepare_corpus
from headway.data.corpus_spec import CorpusSpec
from headway.data.source_spec import SourceSpec
from headway.data.tokenizers import byte_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

tokenizer = byte_tokenizer()
before = peak()
spec = CorpusSpec(sources=(SourceSpec(path=sys.argv[1]),), held_out_fraction=0.05)
corpus = prepare_corpus(spec, tokenizer, Path(sys.argv[2]))
print(corpus.num_tokens, (peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_memory_does_not_grow_with_the_text(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    rng = np.random.default_rng(0)
    words = [b"%x" % number for number in rng.integers(0, 1 << 40, 200_000)]
    size = 0
    # one long text without repeated n-grams, one of a single line, and many small ones
    with (root / "big.txt").open("wb") as file:
        for _ in range(25):
            size += file.write(b" ".join(words[number] for number in rng.permutation(200_000)) + b"\n")
    size += (root / "line.txt").write_bytes(b"x" * 30_000_000)
    for number in range(200):
        size += (root / f"small{number}.txt").write_bytes(b" ".join(words[number * 900 : number * 900 + 2000]))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(root), str(tmp_path / "cache")],
        check=True,
        capture_output=True,
        text=True,
    )
    tokens, growth = map(int, done.stdout.split())
    assert tokens > 0.9 * size
    assert size > 85_000_000
    assert growth < 180_000_000  # the text and its tokens would take 270
