"""Streams of records, brought to disk in shards that have an end and a way back.

    <folder>/shard-00000.jsonl.zst   records in the order of the stream, about 64 MB of text each
    <folder>/stream.json             how many records the finished shards hold, and of which stream

A shard is written aside and moved; a stream that breaks off is read on from the last whole shard, and so is one of which
more is wanted later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

from headway.data.files import ListedFile
from headway.data.formats.jsonl import JsonLinesFile
from headway.data.formats.records import field_value
from headway.data.source_spec import SourceSpec
from headway.errors import DataError

SHARD_BYTES = 1 << 26
_STATE = "stream.json"
_CACHE_LEVEL = 3


def stream_folder(spec: SourceSpec, directory: Path) -> Path:
    """Where the shards of a stream are kept: the same folder whatever number of its documents is asked for."""
    identity = [spec.path, spec.config, spec.revision, spec.split, sorted(spec.needed_fields)]
    return directory / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def materialize_stream(
    open_stream: Callable[[], Iterable[Mapping[str, Any]]],
    folder: Path,
    *,
    spec: SourceSpec,
    name: str,
    notice: Callable[[str], None] = lambda text: None,
) -> list[JsonLinesFile]:
    """Bring the first `spec.take` records of a stream to disk, as far as they are not there yet.

    Args:
        open_stream: gives the stream from its start; records must come in the same order every time.
        folder: of the shards; one stream only.
        spec: names the fields that are kept and how many records.
        name: documents are called after it.
        notice: told what is read.

    Returns:
        The shards.

    Raises:
        DataError: the stream shuffles in a buffer, breaks off, or ends before what is there already; a folder of
            another stream; the disk refuses.
    """
    assert spec.take is not None, "a spec of a stream has take"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sizes, ended = _read_state(folder)
        done = sum(sizes)
        if done < spec.take and not ended:
            notice(f"{spec.path}: reading records {done + 1} to {spec.take} of the stream")
            records = _from(open_stream(), done, spec)
            _write_shards(islice(records, spec.take - done), folder, sizes, spec)
    except OSError as error:
        raise DataError(
            f"the stream {spec.path!r} could not be kept in {str(folder)!r} ({error.strerror or error}); what was read "
            f"is kept: mend it and start again"
        ) from error
    sizes, ended = _read_state(folder)
    if ended and sum(sizes) < spec.take:
        notice(f"{spec.path}: the stream ended after {sum(sizes)} records, {spec.take} were asked for")
    return [
        JsonLinesFile(ListedFile(folder / _shard(number), f"{name}/{_shard(number)}", name), spec)
        for number in range(len(sizes))
    ]


def refuse_shuffle_buffer(stream: object) -> None:
    """Refuse a `datasets.IterableDataset` that was shuffled in a buffer.

    Raises:
        DataError: it is one.
    """
    iterable = getattr(stream, "_ex_iterable", None)
    while iterable is not None:
        if type(iterable).__name__.startswith("BufferShuffled"):
            raise DataError(
                "the stream shuffles in a buffer, whose content is lost when a run is killed, so it could not be "
                "resumed exactly; pass it without shuffle(): headway shuffles all rows, anew in each epoch"
            )
        iterable = getattr(iterable, "ex_iterable", None)


def _from(stream: Iterable[Mapping[str, Any]], start: int, spec: SourceSpec) -> Iterator[Mapping[str, Any]]:
    refuse_shuffle_buffer(stream)
    skip = getattr(stream, "skip", None)
    try:
        records = iter(skip(start)) if callable(skip) else islice(stream, start, None)
        yield from records
    except OSError as error:
        raise DataError(
            f"the stream {spec.path!r} broke off ({' '.join(str(error).split())}); what was read is kept: start again "
            f"to read on"
        ) from error


def _write_shards(records: Iterator[Mapping[str, Any]], folder: Path, sizes: list[int], spec: SourceSpec) -> None:
    exhausted = False
    wanted = spec.take or 0
    while not exhausted and sum(sizes) < wanted:
        path = folder / _shard(len(sizes))
        aside = path.with_name(f".{path.name}.writing")
        count = size = 0
        with aside.open("wb") as file, zstandard.ZstdCompressor(_CACHE_LEVEL).stream_writer(file) as writer:
            while size < SHARD_BYTES:
                record = next(records, None)
                if record is None:
                    exhausted = True
                    break
                size += writer.write(_line(record, spec))
                count += 1
        if count:
            aside.replace(path)
            sizes.append(count)
        else:
            aside.unlink()
        _write_state(folder, sizes, ended=exhausted and sum(sizes) < wanted)


def _line(record: Mapping[str, Any], spec: SourceSpec) -> bytes:
    kept = {}
    for field in spec.needed_fields:
        value = field_value(record, field)
        if value is not None:
            # as JsonLinesFile reads bytes back: those that are not UTF-8 as surrogates
            kept[field] = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if not kept:
        kept = dict.fromkeys(record)
    return json.dumps(kept, default=str).encode() + b"\n"


def _shard(number: int) -> str:
    return f"shard-{number:05d}.jsonl.zst"


def _read_state(folder: Path) -> tuple[list[int], bool]:
    path = folder / _STATE
    if not path.exists():
        return [], False
    try:
        state = json.loads(path.read_bytes())
        return [int(size) for size in state["records"]], bool(state["ended"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is damaged ({error}); delete its folder to read the stream anew") from error


def _write_state(folder: Path, sizes: list[int], *, ended: bool) -> None:
    aside = folder / f".{_STATE}.writing"
    aside.write_text(json.dumps({"records": sizes, "ended": ended}), encoding="utf-8")
    aside.replace(folder / _STATE)
