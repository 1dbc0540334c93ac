"""Files below folders and globs, listed in an order and under names that depend on the text alone."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from headway.data.report import SourceReport
from headway.errors import DataError

SeenFiles = set[tuple[int, int]]
"""Device and inode of every file met: a file reached in two ways must not be trained on twice."""

COMPRESSIONS = (".gz", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A regular file, not opened yet.

    Attributes:
        path: where it lies.
        name: relative to its source, with forward slashes.
        group: the first component inside its source; of a file directly in it: its name without suffix.
    """

    path: Path
    name: str
    group: str


def wanted_suffixes(suffixes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Suffixes in the form that file names are compared with: lower case, one leading dot."""
    return None if suffixes is None else tuple("." + suffix.lower().lstrip(".") for suffix in suffixes)


def is_glob(path: str) -> bool:
    """Whether a path is a pattern; a file of exactly that name comes first."""
    return glob.has_magic(path) and not os.path.lexists(path)


def list_path(
    path: Path,
    prefix: str,
    wanted: tuple[str, ...] | None,
    report: SourceReport,
    *,
    seen: SeenFiles,
    skip_folders: frozenset[str] = frozenset(),
) -> list[ListedFile]:
    """Regular files of a file, folder or glob, sorted by name; only names are held, nothing is opened.

    Links are followed but for those that lead to a folder around the path; each real file and folder is met once.

    Args:
        path: a file is taken whatever its suffix or name; a folder is listed recursively.
        prefix: names start with it and a slash, unless it is empty.
        wanted: only these suffixes in folders and globs, as `wanted_suffixes` gives them.
        report: counts what is left out.
        seen: files met before; grows.
        skip_folders: names of folders not entered.

    Raises:
        DataError: there is no such path, or it is neither file nor folder.
    """
    if is_glob(str(path)):
        return _list_glob(path, prefix, wanted, report, seen=seen, skip_folders=skip_folders)
    check_path(path)
    if path.is_dir():
        files = _below([(path, "")], path, prefix, wanted, report, skip_folders=skip_folders)
        return [file for file in files if _is_new(file.path, report, seen)]
    name = prefix or base_name(path)
    return [ListedFile(path, name, name)] if _is_new(path, report, seen) else []


def check_path(path: Path) -> None:
    """Refuse what is neither a file nor a folder.

    Raises:
        DataError: it is missing, or a device, a pipe or a socket.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read as a source ({reason(error)}); check the spelling and the permissions"
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{str(path)!r} is neither a file nor a folder; copy its text to a file and name that")


def numbered_prefixes(bases: Sequence[str]) -> list[str]:
    """What names of several sources start with: nothing for one, else its own name, numbered where two are the same."""
    if len(bases) == 1:
        return [""]
    used: Counter[str] = Counter()
    prefixes = []
    for base in bases:
        used[base] += 1
        prefixes.append(base if used[base] == 1 else f"{base}#{used[base]}")
    return prefixes


def base_name(path: Path) -> str:
    """The last component of a path; of what it stands for where it is "." or ".."."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return printable(name) or "root"


def printable(name: str) -> str:
    """A name that any text file can hold, also where the system's own is not UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def reason(error: OSError) -> str:
    """Why the system refused, in its words."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def uncompressed_name(name: str) -> str:
    """The name without a suffix of compression, in lower case."""
    lowered = name.lower()
    for suffix in COMPRESSIONS:
        if lowered.endswith(suffix):
            return lowered.removesuffix(suffix)
    return lowered


def _list_glob(
    pattern: Path,
    prefix: str,
    wanted: tuple[str, ...] | None,
    report: SourceReport,
    *,
    seen: SeenFiles,
    skip_folders: frozenset[str],
) -> list[ListedFile]:
    text = str(pattern)
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - Path.glob takes relative patterns only
    if not matches:
        raise DataError(f"{text!r} matches no file; check the pattern (** enters folders), and the folder it starts in")
    fixed = Path(re.split(r"[*?\[]", text, maxsplit=1)[0] + "x").parent
    files: list[ListedFile] = []
    for match in map(Path, matches):
        inside = os.path.relpath(match, fixed).replace(os.sep, "/")
        if match.is_dir():
            if "**" not in pattern.parts[-1]:  # what ** itself matched lists the files below already
                files += _below([(match, f"{inside}/")], match, prefix, wanted, report, skip_folders=skip_folders)
        elif wanted is not None and not has_suffix(match.name, wanted):
            report.other_suffix += 1
        else:
            files.append(_named(match, inside, prefix))
    files.sort(key=lambda file: file.name)
    return [file for file in files if _is_new(file.path, report, seen)]


def _below(
    pending: list[tuple[Path, str]],
    root: Path,
    prefix: str,
    wanted: tuple[str, ...] | None,
    report: SourceReport,
    *,
    skip_folders: frozenset[str],
) -> list[ListedFile]:
    files: list[ListedFile] = []
    # a folder is entered once, and those around the root never: a link up would bring in what nobody named
    folders_seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
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
            report.unreadable.append((printable(inside or "."), reason(error)))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                report.hidden += 1
            elif _is_folder(entry):
                if entry.name not in skip_folders:
                    pending.append((Path(entry.path), f"{inside}{entry.name}/"))
            elif wanted is not None and not has_suffix(entry.name, wanted):
                report.other_suffix += 1
            else:
                files.append(_named(Path(entry.path), f"{inside}{entry.name}", prefix))
    files.sort(key=lambda file: file.name)
    return files


def has_suffix(name: str, wanted: Iterable[str]) -> bool:
    """Whether a file name ends in one of the suffixes, itself or without its suffix of compression."""
    return name.lower().endswith(tuple(wanted)) or uncompressed_name(name).endswith(tuple(wanted))


def _named(path: Path, inside: str, prefix: str) -> ListedFile:
    name = printable(inside)
    first, *rest = name.split("/")
    group = first if rest else PurePosixPath(first).stem
    return ListedFile(path, f"{prefix}/{name}", f"{prefix}/{group}") if prefix else ListedFile(path, name, group)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; counted as special when it turns out not to be a file either
        return False


def _is_new(path: Path, report: SourceReport, seen: SeenFiles) -> bool:
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
