"""Text that the reference model is measured on: held-out packages, and corpora that a caller names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.data.sources import standard_library
from headway.errors import ConfigError, DataError
from headway.experiments.bench.prompts import BenchPrompts
from headway.experiments.reference.place import reference_prompts, reference_record

HELD_OUT = "held-out packages"


@dataclass(frozen=True)
class MeasuredText:
    """One corpus.

    Attributes:
        name: shown.
        windows: pieces of its text, none overlapping, as bytes.
        prompts: what is continued.
    """

    name: str
    windows: tuple[bytes, ...]
    prompts: BenchPrompts


def held_out_text(folder: Path, *, windows: int, window_bytes: int, prompts: int, prompt_bytes: int) -> MeasuredText:
    """Packages of the running interpreter's library that the reference model has never seen.

    Args:
        folder: of the reference model, whose record names them.
        windows: pieces, evenly spaced over all of them.
        window_bytes: length of a piece.
        prompts: functions to continue.
        prompt_bytes: length of each.

    Raises:
        DataError: too little of these packages here.
    """
    packages = set(reference_record(folder)["data"]["held_out_packages"])
    texts = [document.data for document in standard_library() if document.group in packages]
    chosen = reference_prompts(folder, count=prompts, prompt_bytes=prompt_bytes)
    rows = tuple(prompt.tokens for prompt in chosen)
    return MeasuredText(
        HELD_OUT, pieces(texts, count=windows, size=window_bytes, name=HELD_OUT), BenchPrompts(HELD_OUT, rows, rows)
    )


def named_text(corpus: str, *, windows: int, window_bytes: int, prompts: int, prompt_bytes: int) -> MeasuredText:
    """A corpus as the command line names it: NAME=FILE, or NAME=FILE:FIELD+FIELD for JSON lines, gzipped or not.

    Raises:
        ConfigError: not of this form.
        DataError: a file that cannot be read, or holds too little text.
    """
    name, equals, place = corpus.partition("=")
    if not equals or not name or not place:
        raise ConfigError(f"a corpus is NAME=FILE or NAME=FILE:FIELD+FIELD: got {corpus!r}")
    file, _, fields = place.partition(":")
    texts = read_texts(Path(file), tuple(fields.split("+")) if fields else ())
    rows = tuple(tuple(piece[:prompt_bytes]) for piece in pieces(texts, count=prompts, size=prompt_bytes, name=name))
    return MeasuredText(
        name, pieces(texts, count=windows, size=window_bytes, name=name), BenchPrompts(name, rows, rows)
    )


def read_texts(file: Path, fields: Sequence[str]) -> list[bytes]:
    """The documents of a file: one, or one per JSON line with the given fields behind each other.

    Raises:
        DataError: a file that cannot be read, a line without the fields, or JSON lines without any.
    """
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
    except OSError as error:
        raise DataError(f"cannot read {file.name}: {error.strerror or error}; check the path") from error
    if not fields:
        if ".jsonl" in file.suffixes:
            raise DataError(f"{file.name} has fields; name those that hold its text: NAME=FILE:FIELD+FIELD")
        return [data]
    texts = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        lost = [field for field in fields if not isinstance(record.get(field), str)]
        if lost:
            raise DataError(f"{file.name}, line {number}: no text in {lost[0]!r}; it has {', '.join(record)}")
        texts.append("\n".join(record[field] for field in fields).encode())
    return texts


def pieces(texts: Sequence[bytes], *, count: int, size: int, name: str) -> tuple[bytes, ...]:
    """`count` pieces of exactly `size` bytes, evenly spaced over all that the texts can be cut into.

    >>> pieces([b"abcdef", b"xy"], count=2, size=2, name="letters")
    (b'ab', b'ef')

    Raises:
        DataError: fewer pieces than wanted.
    """
    cut = [text[start : start + size] for text in texts for start in range(0, len(text) - size + 1, size)]
    if len(cut) < count:
        raise DataError(f"{name} has {len(cut)} pieces of {size} bytes, {count} are wanted; pass a longer text")
    return tuple(cut[number * len(cut) // count] for number in range(count))
