"""Documents from files and folders, and from the standard library of the running interpreter.

Everything is read as bytes, in an order and under names that depend on the text alone: names are relative to what the
caller named, so a cache built from them is the same on every machine. What cannot be used is left out and counted in a
`SourceReport`; what is strange but usable (NULs, undecodable bytes, enormous lines) is kept and counted.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath

from headway.errors import DataError

LONG_LINE_BYTES = 1 << 20
"""A document with a line longer than this is counted as having a long line."""

_STANDARD_LIBRARY_EXCLUDED = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})
_MACHINE_SPECIFIC = ("_sysconfigdata", "config-")
_NAMED_IN_REPORT = 3


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: unique, relative to its source, with forward slashes.
        group: what must not be torn apart by a split: the top-level folder, package or module.
        data: the raw bytes.
    """

    name: str
    group: str
    data: bytes


@dataclass
class SourceReport:
    """What a source gave and what it left out; filled in while its documents are read.

    Attributes:
        documents: given.
        num_bytes: given.
        empty: files without a byte, left out.
        repeated: files met before under another name (links), left out.
        hidden: files and folders whose name starts with a dot, and `__pycache__`, left out unless named by the caller.
        other_suffix: files without one of the suffixes asked for, left out.
        special: devices, pipes, sockets and dangling links, left out.
        unreadable: (name, reason) of files and folders that the system would not read, left out.
        undecodable: given, with bytes that are not UTF-8.
        with_nul: given, with NUL bytes.
        long_lines: given, with a line above 1 MiB.
    """

    documents: int = 0
    num_bytes: int = 0
    empty: int = 0
    repeated: int = 0
    hidden: int = 0
    other_suffix: int = 0
    special: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    undecodable: int = 0
    with_nul: int = 0
    long_lines: int = 0

    def describe(self) -> str:
        """One line for a person.

        >>> SourceReport(documents=3, num_bytes=5_200_000, empty=1, with_nul=2).describe()
        '3 documents, 5.20 MB; left out: 1 empty; kept although: 2 with NUL bytes'
        """
        unreadable = ", ".join(f"{name!r} {reason}" for name, reason in self.unreadable[:_NAMED_IN_REPORT])
        more = ", ..." if len(self.unreadable) > _NAMED_IN_REPORT else ""
        left_out = {
            "empty": self.empty,
            "repeated by links": self.repeated,
            "hidden": self.hidden,
            "of another suffix": self.other_suffix,
            "not regular files": self.special,
            f"unreadable ({unreadable}{more})": len(self.unreadable),
        }
        kept = {
            "with undecodable bytes": self.undecodable,
            "with NUL bytes": self.with_nul,
            "with lines above 1 MiB": self.long_lines,
        }
        parts = [f"{self.documents} document{'' if self.documents == 1 else 's'}, {self.num_bytes / 1e6:.2f} MB"]
        for title, counts in (("left out", left_out), ("kept although", kept)):
            listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            if listed:
                parts.append(f"{title}: {listed}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str
    group: str


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
        _check_root(root)
    wanted = None if suffixes is None else tuple("." + suffix.lower().lstrip(".") for suffix in suffixes)
    return _read_roots(roots, wanted, SourceReport() if report is None else report)


def standard_library(*, report: SourceReport | None = None) -> Iterator[Document]:
    """The running interpreter's standard library: every .py file but tests, idlelib and installed packages.

    The group is the top-level package or module. Files that the interpreter's build wrote for this machine
    (`_sysconfigdata*`, `config-*`) are left out.

    Raises:
        DataError: this interpreter has no library source on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    report = SourceReport() if report is None else report
    found = 0
    if root.is_dir():
        for file in _files_below(root, "", (".py",), report, seen=set(), skip_folders=_STANDARD_LIBRARY_EXCLUDED):
            if not file.name.startswith(_MACHINE_SPECIFIC):
                for document in _read(file, report):
                    found += 1
                    yield document
    if not found:
        raise DataError(
            f"this Python {sysconfig.get_python_version()} has no standard-library source on disk; "
            f"name files or folders of text instead"
        )


def _check_root(root: Path) -> None:
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise DataError(
            f"{str(root)!r} cannot be read as a source ({_reason(error)}); check the spelling and the permissions"
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{str(root)!r} is neither a file nor a folder; copy its text to a file and name that")


def _read_roots(roots: Sequence[Path], wanted: tuple[str, ...] | None, report: SourceReport) -> Iterator[Document]:
    # shared by all paths: a file reached from two of them must not be trained on twice
    seen: set[tuple[int, int]] = set()
    prefixes = _prefixes(roots)
    for root, prefix in zip(roots, prefixes, strict=True):
        if root.is_dir():
            files = _files_below(root, prefix, wanted, report, seen=seen)
        else:
            name = prefix or _base_name(root)
            files = [_File(root, name, name)] if _is_new(root, report, seen) else []
        for file in files:
            yield from _read(file, report)
    if not report.documents:
        named = ", ".join(repr(str(root)) for root in roots[:_NAMED_IN_REPORT])
        raise DataError(
            f"no text in {named}{', ...' if len(roots) > _NAMED_IN_REPORT else ''} ({report.describe()}); "
            f"name files with text in them{'' if wanted is None else f', or other suffixes than {list(wanted)}'}"
        )


def _prefixes(roots: Sequence[Path]) -> list[str]:
    """What names start with: nothing for one root, else its last component, numbered where two are the same."""
    if len(roots) == 1:
        return [""]
    used: Counter[str] = Counter()
    prefixes = []
    for root in roots:
        base = _base_name(root)
        used[base] += 1
        prefixes.append(base if used[base] == 1 else f"{base}#{used[base]}")
    return prefixes


def _base_name(root: Path) -> str:
    """The last component of a path; of what it stands for where it is "." or ".."."""
    name = root.name if root.name not in ("", "..") else root.resolve().name
    return _printable(name) or "root"


def _files_below(
    root: Path,
    prefix: str,
    wanted: tuple[str, ...] | None,
    report: SourceReport,
    *,
    seen: set[tuple[int, int]],
    skip_folders: frozenset[str] = frozenset(),
) -> list[_File]:
    """Regular files below a folder, sorted by name; only names are held, nothing is opened."""
    files: list[_File] = []
    # a folder is entered once, and those around the root never: a link up would bring in what nobody named
    folders_seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
    pending = [(root, "")]
    while pending:
        folder, inside = pending.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in folders_seen:
                report.repeated += 1
                continue
            folders_seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            report.unreadable.append((_printable(inside or "."), _reason(error)))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                report.hidden += 1
            elif _is_folder(entry):
                if entry.name not in skip_folders:
                    pending.append((Path(entry.path), f"{inside}{entry.name}/"))
            elif wanted is not None and not entry.name.lower().endswith(wanted):
                report.other_suffix += 1
            else:
                files.append(_named(Path(entry.path), f"{inside}{entry.name}", prefix))
    files.sort(key=lambda file: file.name)
    return [file for file in files if _is_new(file.path, report, seen)]


def _named(path: Path, inside: str, prefix: str) -> _File:
    name = _printable(inside)
    first, *rest = name.split("/")
    group = first if rest else PurePosixPath(first).stem
    return _File(path, f"{prefix}/{name}", f"{prefix}/{group}") if prefix else _File(path, name, group)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; counted as special when it turns out not to be a file either
        return False


def _is_new(path: Path, report: SourceReport, seen: set[tuple[int, int]]) -> bool:
    """Whether the path is a regular file not met before; opening anything else could block for ever."""
    try:
        status = path.stat()
    except OSError:
        report.special += 1
        return False
    if not stat.S_ISREG(status.st_mode):
        report.special += 1
        return False
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        report.repeated += 1
        return False
    seen.add(identity)
    return True


def _read(file: _File, report: SourceReport) -> Iterator[Document]:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        report.unreadable.append((file.name, _reason(error)))
        return
    if not data:
        report.empty += 1
        return
    report.documents += 1
    report.num_bytes += len(data)
    report.with_nul += b"\0" in data
    report.undecodable += not is_utf8(data)
    report.long_lines += _has_long_line(data)
    yield Document(name=file.name, group=file.group, data=data)


def is_utf8(data: bytes) -> bool:
    """Whether the bytes decode as UTF-8 without loss."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _has_long_line(data: bytes) -> bool:
    start = 0
    while len(data) - start > LONG_LINE_BYTES:
        newline = data.rfind(b"\n", start, start + LONG_LINE_BYTES + 1)
        if newline < 0:
            return True
        start = newline + 1
    return False


def _printable(name: str) -> str:
    """A name that any text file can hold, also where the system's own is not UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
