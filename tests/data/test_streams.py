import itertools
import json

import pytest

from headway.data.formats import stream
from headway.data.formats.stream import materialize_stream, refuse_shuffle_buffer, stream_folder
from headway.data.source_spec import SourceSpec, parse_source
from headway.errors import DataError


def spec(take, **options):
    return SourceSpec(path="hf:name", streaming=True, take=take, **options)


def endless(counter=None):
    for number in itertools.count():
        if counter is not None:
            counter.append(number)
        yield {"text": f"record {number} " + "x" * 50, "other": number}


def read(files, count=None):
    entries = (entry for file in files for entry in file.entries(report=stream_report()))
    return [b"".join(entry.pieces).split(b" x")[0].decode() for entry in itertools.islice(entries, count)]


def stream_report():
    from headway.data.report import SourceReport

    return SourceReport()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", 1000)


def test_an_unbounded_stream_becomes_shards_and_is_not_read_again(tmp_path):
    seen = []
    files = materialize_stream(lambda: endless(seen), tmp_path / "s", spec=spec(100), name="s")
    assert len(files) > 3
    assert read(files) == [f"record {number}" for number in range(100)]
    assert seen == [*range(100)]
    again = materialize_stream(lambda: pytest.fail("read again"), tmp_path / "s", spec=spec(100), name="s")
    assert read(again) == read(files)
    assert files[0].name == "s/shard-00000.jsonl.zst"


def test_more_of_a_stream_is_read_on_from_what_is_there(tmp_path):
    materialize_stream(endless, tmp_path / "s", spec=spec(50), name="s")
    first = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.zst")}
    notices = []
    files = materialize_stream(endless, tmp_path / "s", spec=spec(90), name="s", notice=notices.append)
    assert read(files) == [f"record {number}" for number in range(90)]
    assert all((tmp_path / "s" / name).read_bytes() == content for name, content in first.items())
    assert notices == ["hf:name: reading records 51 to 90 of the stream"]
    assert stream_folder(spec(50), tmp_path) == stream_folder(spec(90), tmp_path)
    assert stream_folder(spec(50), tmp_path) != stream_folder(spec(50, field="other"), tmp_path)


def test_a_stream_that_breaks_off_keeps_whole_shards_and_is_taken_up(tmp_path):
    def breaking():
        yield from itertools.islice(endless(), 60)
        raise ConnectionResetError("the network is gone")

    with pytest.raises(DataError, match=r"broke off .the network is gone.; what was read is kept"):
        materialize_stream(breaking, tmp_path / "s", spec=spec(100), name="s")
    kept = sum(json.loads((tmp_path / "s/stream.json").read_text())["records"])
    assert 0 < kept <= 60
    notices = []
    files = materialize_stream(endless, tmp_path / "s", spec=spec(100), name="s", notice=notices.append)
    assert notices == [f"hf:name: reading records {kept + 1} to 100 of the stream"]
    assert read(files) == [f"record {number}" for number in range(100)]
    assert not [*(tmp_path / "s").glob(".*")]


def test_a_stream_that_ends_early_is_said_once_and_remembered(tmp_path):
    notices = []
    short = lambda: itertools.islice(endless(), 7)  # noqa: E731
    files = materialize_stream(short, tmp_path / "s", spec=spec(100), name="s", notice=notices.append)
    assert len(read(files)) == 7
    assert notices[-1] == "hf:name: the stream ended after 7 records, 100 were asked for"
    files = materialize_stream(lambda: pytest.fail("read again"), tmp_path / "s", spec=spec(100), name="s")
    assert len(read(files)) == 7


def test_records_that_lack_the_field_are_known_by_the_fields_they_have(tmp_path):
    files = materialize_stream(endless, tmp_path / "s", spec=spec(5, field="body"), name="s")
    with pytest.raises(DataError, match="no field 'body'; they have 'other', 'text'"):
        read(files)


def test_bytes_of_a_stream_come_back_as_they_were(tmp_path):
    files = materialize_stream(lambda: iter([{"text": b"caf\xe9 x"}]), tmp_path / "s", spec=spec(1), name="s")
    (entry,) = files[0].entries(stream_report())
    assert b"".join(entry.pieces) == b"caf\xe9 x"


def test_a_damaged_state_says_what_to_do(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/stream.json").write_text("{")
    with pytest.raises(DataError, match=r"stream.json' is damaged.*delete its folder"):
        materialize_stream(endless, tmp_path / "s", spec=spec(1), name="s")


def test_shuffle_buffers_are_refused_with_the_reason(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
    refuse_shuffle_buffer(data.take(1))
    for shuffled in (data.shuffle(seed=1, buffer_size=10), data.shuffle(seed=1, buffer_size=10).skip(1)):
        with pytest.raises(DataError, match=r"lost when a run is killed.*headway shuffles all rows"):
            refuse_shuffle_buffer(shuffled)
        with pytest.raises(DataError, match="shuffles in a buffer"):
            materialize_stream(lambda stream=shuffled: stream, tmp_path / "s", spec=spec(1), name="s")


def test_a_streaming_source_of_the_library_is_read_through_shards(tmp_path, gather, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/train.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(50)))
    line = f"hf:{tmp_path}/repo::streaming=true,take=20"
    collection, (report,) = gather(line)
    assert [document.data for document in collection] == [f"t{number}".encode() for number in range(20)]
    assert report.documents == 20
    (tmp_path / "repo/train.jsonl").unlink()
    assert len(gather(line)[0]) == 20
    assert len(gather(str(parse_source(line)).replace("take=20", "take=5"))[0]) == 5
