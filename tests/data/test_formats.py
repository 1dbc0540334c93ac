import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard

from headway.data.formats import jsonl, optional
from headway.data.formats.token_file import TokenRules
from headway.errors import DataError

COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    # several frames in one file, as parallel compressors write them
    ".zst": lambda data: b"".join(
        zstandard.compress(data[start : start + 1000]) for start in range(0, len(data), 1000)
    ),
}


def lines(*records):
    return b"".join(
        (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n" for record in records
    )


def texts(collection):
    return [document.data for document in collection]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_text_is_read_as_what_a_compressed_file_holds(tmp_path, gather, suffix):
    data = "".join(f"line {number} caf\u00e9\n" for number in range(500)).encode()
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESSORS[suffix](data))
    collection, (report,) = gather(tmp_path / f"a.txt{suffix}")
    assert texts(collection) == [data]
    assert report.num_bytes == collection.num_bytes == len(data)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_records_are_documents_in_order_and_can_be_read_in_any_order(tmp_path, gather, suffix):
    records = [{"text": f"text {number} caf\u00e9", "id": number} for number in range(300)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines(*records)))
    collection, _ = gather(path)
    expected = [record["text"].encode() for record in records]
    assert texts(collection) == expected
    assert [document.name for document in collection][:2] == [f"{path.name}:1", f"{path.name}:2"]
    for index in (299, 0, 150, 149, 3):
        assert collection[index].data == expected[index]


def test_unusable_lines_are_counted_in_one_line_and_left_out(tmp_path, gather, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + lines({"text": "first"}, b"{broken", b"", b"[1, 2]", b"[" * 5000, {"text": ""}, {"text": None})
        + lines({"other": 1}, {"text": 7}, {"text": "x" * 2000}, b'{"text": "caf\xe9"}', {"text": "a\0b"})
        + b'{"text": "last, without a newline"}'
    )
    collection, (report,) = gather(path)
    assert texts(collection) == [b"first", b"caf\xe9", b"a\0b", b"last, without a newline"]
    assert [document.name.split(":")[1] for document in collection] == ["1", "11", "12", "13"]
    assert report.describe() == (
        "4 documents, 0.00 MB; left out: 2 empty, 2 with broken JSON, 2 too long for a record, 1 without the field, "
        "1 without text in the field; kept although: 1 with undecodable bytes, 1 with NUL bytes"
    )


def test_half_surrogates_of_an_escape_are_kept_as_undecodable_bytes(tmp_path, gather):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    collection, (report,) = gather(tmp_path / "a.jsonl")
    assert texts(collection) == [b"a\xed\xa0\x80b"]
    assert report.undecodable == 1


def test_a_missing_field_names_those_that_exist(tmp_path, gather):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"body": "x", "meta": {"title": "t"}} for _ in range(200))))
    with pytest.raises(DataError, match=r"'a.jsonl' have no field 'text'; they have 'body', 'meta', 'meta.title'.*fi"):
        gather(tmp_path / "a.jsonl")
    collection, _ = gather(f"{tmp_path}/a.jsonl::field=meta.title,take=3")
    assert texts(collection) == [b"t"] * 3
    (tmp_path / "b.jsonl").write_bytes(lines({"prompt": "p", "completion": "c"}))
    with pytest.raises(DataError, match=r"b.jsonl::prompt=prompt,completion=completion"):
        gather(tmp_path / "b.jsonl")
    collection, _ = gather(f"{tmp_path}/a.jsonl::format=text")
    assert len(collection) == 1


def test_a_file_cut_off_in_the_middle_gives_what_it_has_and_is_named(tmp_path, gather):
    rng = np.random.default_rng(0)
    whole = lines(*({"text": rng.bytes(200).hex()} for _ in range(2000)))
    for suffix in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        data = COMPRESSORS[suffix](whole)
        path.write_bytes(data[: len(data) // 2])
        collection, (report,) = gather(path)
        assert 0 < len(collection) < 2000
        if suffix != ".zst":  # whose frames end where the file does
            assert report.unreadable[0][0] == path.name
            assert "after" in report.unreadable[0][1]
    (tmp_path / "b.txt").write_bytes(b"text")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(whole)[:-100])
    (tmp_path / "d.txt.xz").write_bytes(b"no xz at all")
    for path in tmp_path.glob("a.*"):
        path.unlink()
    collection, (report,) = gather(tmp_path)
    assert texts(collection) == [b"text"]
    assert [name for name, _ in report.unreadable] == ["c.txt.gz", "d.txt.xz"]


def test_examples_have_a_prompt_and_a_completion(tmp_path, gather):
    (tmp_path / "a.jsonl").write_bytes(
        lines({"q": "2+2?", "a": "4", "id": "x"}, {"q": "", "a": "free"}, {"q": "no answer", "a": ""})
    )
    collection, (report,) = gather(f"{tmp_path}/a.jsonl::prompt=q,completion=a")
    assert [(document.data, document.prompt_bytes) for document in collection] == [(b"2+2?4", 4), (b"free", 0)]
    assert report.empty == 1


def test_rewards_become_the_text_before_the_prompt(tmp_path, gather):
    rewards = [True, False, 1, 0, "correct", "Incorrect", 0.5, None, "perhaps"]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"p": "P", "c": "C", "r": reward} for reward in rewards)))
    line = f"{tmp_path}/a.jsonl::prompt=p,completion=c,reward=r"
    collection, (report,) = gather(line)
    correct, incorrect = b"correct\nPC", b"incorrect\nPC"
    assert texts(collection) == [correct, incorrect] * 3
    assert [document.prompt_bytes for document in collection] == [9, 11] * 3
    assert report.without_reward == 3
    collection, _ = gather(line + ",correct=[good]\\n,incorrect=")
    assert texts(collection)[:2] == [b"[good]\nPC", b"PC"]


def test_records_of_one_group_share_it_and_others_go_by_content(tmp_path, gather):
    records = [{"text": f"t{number}", "book": f"b{number % 3}"} for number in range(9)]
    (tmp_path / "a.jsonl").write_bytes(lines(*records, {"text": "t0", "book": "b1"}))
    collection, _ = gather(f"{tmp_path}/a.jsonl::group=book")
    assert [document.group for document in collection] == [f"b{number % 3}" for number in range(9)] + ["b1"]
    collection, _ = gather(tmp_path / "a.jsonl")
    groups = [document.group for document in collection]
    assert groups[9] == groups[0]  # equal texts are never on both sides of a split
    assert len(set(groups)) == 9


def test_folders_globs_and_suffixes_see_through_compression(tmp_path, gather):
    for name in ("x/a.py", "x/b.txt", "x/y/c.md", "z/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "x/e.py.gz").write_bytes(gzip.compress(b"e"))
    names = lambda *args, **options: [document.name for document in gather(*args, **options)[0]]  # noqa: E731
    assert names(tmp_path, suffixes=(".py",)) == ["x/a.py", "x/e.py.gz", "z/d.py"]
    assert names(tmp_path / "*/*.py") == ["x/a.py", "z/d.py"]
    assert names(tmp_path / "**/*.md") == ["x/y/c.md"]
    assert names(tmp_path / "x/*") == ["a.py", "b.txt", "e.py.gz", "y/c.md"]
    assert names(f"{tmp_path}/x/a.py", f"{tmp_path}/z::name=other") == ["a.py", "other/d.py"]
    assert [document.group for document in gather(tmp_path / "*/*.py")[0]] == ["x", "z"]
    with pytest.raises(DataError, match="matches no file; check the pattern"):
        gather(tmp_path / "*.rs")
    (tmp_path / "x/[odd].txt").write_bytes(b"odd")
    assert [document.data for document in gather(tmp_path / "x/[odd].txt")[0]] == [b"odd"]


def test_ids_of_a_matrix_are_rows_and_those_of_a_stream_end_at_the_end_token(tmp_path, gather):
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 256], [3, 4, 5]], dtype=np.int64))
    np.array([7, 8, 256, 256, 9], dtype=">u2").tofile(tmp_path / "stream.bin")
    collection, _ = gather(tmp_path / "rows.npy")
    ids = [np.frombuffer(document.data, "<u4").tolist() for document in collection]
    assert ids == [[1, 2], [3, 4, 5]]
    assert all(document.is_tokens for document in collection)
    collection, (report,) = gather(f"{tmp_path}/stream.bin::dtype=>u2")
    assert [np.frombuffer(document.data, "<u4").tolist() for document in collection] == [[7, 8], [9]]
    assert report.empty == 1


def test_ids_longer_than_a_piece_are_one_document(tmp_path, gather):
    ids = np.arange(700_000, dtype=np.uint32) % 10 + 2570  # bytes of a newline among them
    ids.tofile(tmp_path / "a.bin")
    collection, _ = gather(f"{tmp_path}/a.bin::dtype=uint32", rules=TokenRules(5000, 5001))
    (document,) = collection
    assert np.frombuffer(document.data, "<u4").tolist() == ids.tolist()
    assert max(len(piece) for piece in document.pieces()) == 1 << 20


@pytest.mark.parametrize(
    ("name", "write", "options", "message"),
    [
        ("a.bin", lambda path: np.array([1, 300], "<u2").tofile(path), "dtype=uint16", r"0\.\.257.*got 1\.\.300"),
        ("a.bin", lambda path: np.array([-1], "<i2").tofile(path), "dtype=int16", r"got -1\.\.-1; check dtype"),
        ("a.bin", lambda path: path.write_bytes(b"abc"), "dtype=uint16", "3 bytes, which is no multiple of 2"),
        ("a.bin", lambda path: path.write_bytes(b"abc"), "format=tokens", "does not say.*a.bin::dtype=uint16"),
        ("a.npy", lambda path: np.save(path, np.ones(3)), "format=tokens", "whole numbers.*float64"),
        ("a.npy", lambda path: np.save(path, np.ones((2, 2, 2), int)), "format=tokens", "one or two dimensions"),
        ("a.npy", lambda path: path.write_bytes(b"no numpy"), "format=tokens", "no .npy file"),
    ],
)
def test_files_that_cannot_be_these_ids_are_refused(tmp_path, gather, name, write, options, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        gather(f"{tmp_path}/{name}::{options}")


def test_parquet_rows_are_documents(tmp_path, gather):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [f"row {number} caf\u00e9" for number in range(2000)] + [None]
    table = arrow.table({"text": values, "id": range(2001), "raw": [b"\xff"] * 2001})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    collection, (report,) = gather(tmp_path / "a.parquet")
    assert texts(collection) == [value.encode() for value in values[:2000]]
    assert report.empty == 1
    for index in (1999, 5, 701, 702, 0):
        assert collection[index].data == values[index].encode()
    assert collection[5].name == "a.parquet:6"
    assert texts(gather(f"{tmp_path}/a.parquet::field=raw,take=2")[0]) == [b"\xff"] * 2
    with pytest.raises(DataError, match="no field 'body'; they have 'id', 'raw', 'text'"):
        gather(f"{tmp_path}/a.parquet::field=body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"no text in .*b.parquet.*1 unreadable \('b.parquet' is damaged"):
        gather(tmp_path / "b.parquet")


def test_saved_datasets_are_known_by_their_folder(tmp_path, gather):
    datasets = pytest.importorskip("datasets")
    values = [f"row {number}" for number in range(600)]
    data = datasets.Dataset.from_dict({"text": values, "n": [{"deep": f"d{number}"} for number in range(600)]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "many")
    assert texts(gather(tmp_path / "one")[0]) == [value.encode() for value in values]
    collection, _ = gather(f"{tmp_path}/many::split=test,field=n.deep")
    assert texts(collection) == [b"d3"]
    assert [document.name for document in collection] == ["many:1"]
    collection, _ = gather(tmp_path / "many")
    assert collection[599].data == b"row 599"
    assert collection[0].data == b"row 0"
    with pytest.raises(DataError, match="no split 'dev'; it has 'train', 'test'"):
        gather(f"{tmp_path}/many::split=dev")
    with pytest.raises(DataError, match="no field 'body'; they have"):
        gather(f"{tmp_path}/one::field=body")


def test_names_of_the_hub_may_be_folders_that_load_dataset_takes(tmp_path, gather, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/train.jsonl").write_bytes(lines(*({"text": f"t{number}"} for number in range(5))))
    collection, _ = gather(f"hf:{tmp_path}/repo::split=train,take=4")
    assert texts(collection) == [b"t0", b"t1", b"t2", b"t3"]
    with pytest.raises(DataError, match=r"could not be loaded.*check its name"):
        gather(f"hf:{tmp_path}/missing")


def test_a_format_without_its_package_says_how_to_install_it(monkeypatch):
    with pytest.raises(
        DataError, match=r"reading nothing needs the package no_such.*pip install 'headway\[datasets\]'"
    ):
        optional.optional_package("no_such.part", needed_for="reading nothing")
