"""Documents from files and folders, and from the standard library of the running interpreter.

Everything is read as bytes, in an order and under names that depend on the text alone: names are relative to what the
caller named, so a cache built from them is the same on every machine. What cannot be used is left out and counted in a
`SourceReport`; what is strange but usable (NULs, undecodable bytes, enormous lines) is kept and counted.

Here files are read whole, one at a time, as they are. Compressed files, records, datasets and texts larger than the
memory: `headway.data.collect`.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

from headway.data.document import Document, is_utf8
from headway.data.files import (
    ListedFile,
    SeenFiles,
    base_name,
    check_path,
    list_path,
    numbered_prefixes,
    reason,
    wanted_suffixes,
)
from headway.data.report import LONG_LINE_BYTES, NAMED_IN_REPORT, SourceReport
from headway.errors import DataError

__all__ = [
    "LONG_LINE_BYTES",
    "Document",
    "SourceReport",
    "is_utf8",
    "iter_files",
    "list_standard_library",
    "standard_library",
]

_STANDARD_LIBRARY_EXCLUDED = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})
_MACHINE_SPECIFIC = ("_sysconfigdata", "config-")


def iter_files(
    paths: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    suffixes: Sequence[str] | None = None,
    report: SourceReport | None = None,
) -> Iterator[Document]:
    """Documents of files and folders, in the order of `paths` and sorted by name within each.

    Names are relative to the path they come from; with several paths they start with that path's own last component.
    The group is the first component inside the path (a file directly in it: its name without suffix; a file named by
    the caller: its name). Links are followed but for those that lead to a folder around the path; each real file and
    folder is read once.

    Args:
        paths: files, or folders read recursively. A file named here is read whatever its suffix or name.
        suffixes: keep only these in folders, e.g. [".py"]; letter case does not matter.
        report: filled in while the documents are read.

    Returns:
        An iterator that holds one document at a time. Paths are checked at once, not at the first document.

    Raises:
        DataError: no path, a path that does not exist or is neither file nor folder; at the end: nothing usable found.
    """
    roots = [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]
    if not roots:
        raise DataError("a source needs at least one file or folder: got none; name the text to read")
    for root in roots:
        check_path(root)
    return _read_roots(roots, wanted_suffixes(suffixes), SourceReport() if report is None else report)


def standard_library(*, report: SourceReport | None = None) -> Iterator[Document]:
    """The running interpreter's standard library: every .py file but tests, idlelib and installed packages.

    The group is the top-level package or module. Files that the interpreter's build wrote for this machine
    (`_sysconfigdata*`, `config-*`) are left out.

    Raises:
        DataError: this interpreter has no library source on disk.
    """
    report = SourceReport() if report is None else report
    found = 0
    for file in list_standard_library("", report):
        for document in _read(file, report):
            found += 1
            yield document
    if not found:
        raise no_standard_library()


def list_standard_library(prefix: str, report: SourceReport) -> list[ListedFile]:
    """The files that `standard_library` reads; none where this interpreter has no source on disk."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        return []
    files = list_path(root, prefix, (".py",), report, seen=set(), skip_folders=_STANDARD_LIBRARY_EXCLUDED)
    start = f"{prefix}/" if prefix else ""
    return [file for file in files if not file.name.removeprefix(start).startswith(_MACHINE_SPECIFIC)]


def no_standard_library() -> DataError:
    """The error of an interpreter without library source."""
    return DataError(
        f"this Python {sysconfig.get_python_version()} has no standard-library source on disk; "
        f"name files or folders of text instead"
    )


def no_text(named: str, report: SourceReport, *, suffixes: Sequence[str] | None) -> DataError:
    """The error of a source in which nothing usable was found."""
    other = "" if suffixes is None else f", or other suffixes than {list(suffixes)}"
    return DataError(f"no text in {named} ({report.describe()}); name files with text in them{other}")


def _read_roots(roots: Sequence[Path], wanted: tuple[str, ...] | None, report: SourceReport) -> Iterator[Document]:
    seen: SeenFiles = set()
    prefixes = numbered_prefixes([base_name(root) for root in roots])
    for root, prefix in zip(roots, prefixes, strict=True):
        for file in list_path(root, prefix, wanted, report, seen=seen):
            yield from _read(file, report)
    if not report.documents:
        named = ", ".join(repr(str(root)) for root in roots[:NAMED_IN_REPORT])
        raise no_text(f"{named}{', ...' if len(roots) > NAMED_IN_REPORT else ''}", report, suffixes=wanted)


def _read(file: ListedFile, report: SourceReport) -> Iterator[Document]:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        report.unreadable.append((file.name, reason(error)))
        return
    document = Document(file.name, file.group, data)
    for _ in report.watch(document.pieces()):
        pass
    if data:
        yield document
