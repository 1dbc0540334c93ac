"""From sources to one collection of documents: every format, read once from end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.data.collection import Collection, CollectionBuilder
from headway.data.files import (
    ListedFile,
    SeenFiles,
    base_name,
    list_path,
    numbered_prefixes,
    uncompressed_name,
    wanted_suffixes,
)
from headway.data.formats.hugging_face import HuggingFaceTable, is_saved_dataset, load_stream, load_table
from headway.data.formats.jsonl import JsonLinesFile
from headway.data.formats.parquet import ParquetFile
from headway.data.formats.source_file import SourceFile
from headway.data.formats.stream import materialize_stream, stream_folder
from headway.data.formats.text import TextFile
from headway.data.formats.token_file import TokenFile, TokenRules
from headway.data.report import SourceReport
from headway.data.source_spec import HUB, STANDARD_LIBRARY, SourceSpec
from headway.data.sources import list_standard_library, no_standard_library, no_text
from headway.errors import DataError

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class OpenedSource:
    """A source whose files are known and not read yet.

    Attributes:
        spec: what was asked for.
        label: what it is called, told apart from the other sources.
        files: in the order in which they are read.
        report: counts what was left out while they were listed, and later what is read.
    """

    spec: SourceSpec
    label: str
    files: tuple[SourceFile, ...]
    report: SourceReport


def open_sources(
    specs: Sequence[SourceSpec],
    *,
    token_rules: TokenRules,
    stream_directory: Path,
    suffixes: Sequence[str] | None = None,
    seen: SeenFiles | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[OpenedSource]:
    """Find the files of sources; streams are brought to disk first.

    With several sources, the names of documents begin with their source's own. A file reached from two sources belongs
    to the first.

    Args:
        specs: in the order of the documents.
        token_rules: what raw ids mean.
        stream_directory: where streams are kept.
        suffixes: of files in folders and globs, such as [".py"]; with or without a suffix of compression.
        seen: files that belong to others, and are left out here; grows by the files found.
        notice: told about streams that are read.

    Raises:
        DataError: a path that does not exist, a dataset that cannot be loaded, no source.
    """
    if not specs:
        raise DataError("a corpus needs at least one source: got none; name the text to read")
    labels = source_labels(specs)
    prefixes = [""] if len(specs) == 1 else labels
    wanted = wanted_suffixes(suffixes)
    seen = set() if seen is None else seen
    sources = []
    for spec, label, prefix in zip(specs, labels, prefixes, strict=True):
        report = SourceReport()
        if spec.path == STANDARD_LIBRARY:
            listed = list_standard_library(prefix, report)
            if not listed:
                raise no_standard_library()
            files: list[SourceFile] = [TextFile(file) for file in listed]
        elif spec.is_hub or spec.format == "huggingface" or _is_saved(spec):
            files = _dataset(spec, prefix or label, stream_directory, notice)
        else:
            listed = list_path(Path(spec.path), prefix, wanted, report, seen=seen)
            files = [_file(file, spec, token_rules) for file in listed]
        sources.append(OpenedSource(spec, label, tuple(files), report))
    return sources


def collect(sources: Sequence[OpenedSource], *, suffixes: Sequence[str] | None = None) -> Collection:
    """Read all sources once and remember where their documents are; the reports of the sources are filled in.

    Args:
        sources: as `open_sources` gives them.
        suffixes: named in the error of a source without text.

    Raises:
        DataError: nothing usable in a source, or records without the field asked for.
    """
    builder = CollectionBuilder()
    for source in sources:
        builder.add_source(source.label)
        for file in source.files:
            if source.spec.take is None:
                builder.add_file(file, source.report)
            elif source.report.documents < source.spec.take:
                builder.add_file(file, source.report, at_most=source.spec.take - source.report.documents)
        if not source.report.documents:
            raise no_text(repr(source.spec.path), source.report, suffixes=suffixes)
    return builder.finish()


def source_labels(specs: Sequence[SourceSpec]) -> list[str]:
    """What sources are called: by their own name, else the last component of the path, numbered where two are the same."""
    bases = [spec.name or _base(spec) for spec in specs]
    return numbered_prefixes(bases) if len(bases) > 1 else bases


def _base(spec: SourceSpec) -> str:
    if spec.path == STANDARD_LIBRARY:
        return STANDARD_LIBRARY
    return base_name(Path(spec.path.removeprefix(HUB)))


def _is_saved(spec: SourceSpec) -> bool:
    return spec.format == "auto" and is_saved_dataset(Path(spec.path))


def _file(file: ListedFile, spec: SourceSpec, rules: TokenRules) -> SourceFile:
    inner = uncompressed_name(file.path.name)
    named = spec.format
    if named == "auto":
        # of a folder of anything, only what was meant to be ids is: source code comes with .npy files of its own
        if spec.dtype is not None or (inner.endswith(".npy") and spec.path.lower().endswith(".npy")):
            named = "tokens"
        elif inner.endswith(_JSON_LINES):
            named = "jsonl"
        elif inner.endswith(".parquet"):
            named = "parquet"
    if named == "tokens":
        return TokenFile(file, spec.dtype, rules)
    if named == "jsonl":
        return JsonLinesFile(file, spec)
    if named == "parquet":
        return ParquetFile(file, spec)
    return TextFile(file)


def _dataset(spec: SourceSpec, name: str, directory: Path, notice: Callable[[str], None]) -> list[SourceFile]:
    if not spec.streaming:
        return [HuggingFaceTable(load_table(spec), name, spec)]
    folder = stream_folder(spec, directory)
    return [*materialize_stream(lambda: load_stream(spec), folder, spec=spec, name=name, notice=notice)]
