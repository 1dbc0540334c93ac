"""Where a token cache is built: a hidden, locked folder beside its place, found again after a kill.

.<name>.partial        of the first builder; what a killed one left there is taken up again
.<name>.XXXX.partial   of another builder at the same time; of no use to anyone after its end
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no builder can tell whether another one lives, so none takes up what is there
    fcntl = None  # type: ignore[assignment]

_HAS_LOCKS: bool = fcntl is not None
_LOCK = "lock"
_ABANDONED_SECONDS = 3600.0
_FORGOTTEN_SECONDS = 7 * 86400.0


@dataclass
class Staging:
    """A folder to build in.

    Attributes:
        folder: moved away when it is finished.
        is_shared: whether a later builder finds what this one leaves behind.
        keep: whether to leave the folder behind at the end.
    """

    folder: Path
    is_shared: bool
    keep: bool = False


@contextmanager
def staging(directory: Path) -> Iterator[Staging]:
    """A folder beside the final one, gone at the end unless `keep` was set (or this process was killed).

    What former builders of the same cache left behind, and nobody can take up, is removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory)
    shared = directory.with_name(f".{directory.name}.partial")
    lock = _lock(shared)
    if lock is None:
        folder = _private(directory)
        lock = _lock(folder)
    else:
        folder = shared
    place = Staging(folder, is_shared=folder == shared)
    try:
        yield place
    finally:
        if not place.keep:
            shutil.rmtree(place.folder, ignore_errors=True)
        if lock is not None:
            lock.close()


def unlock(place: Staging, directory: Path) -> None:
    """Take the folder out of other builders' reach and its lock out of the folder, so that it can be published."""
    if place.is_shared:
        private = _private(directory)
        place.folder.replace(private)
        place.folder, place.is_shared = private, False
    (place.folder / _LOCK).unlink(missing_ok=True)


@contextmanager
def aside(directory: Path) -> Iterator[Path]:
    """An empty folder beside another one, gone at the end with what was moved there."""
    folder = _private(directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_forgotten(directory: Path) -> None:
    """Remove what builds of caches named by a key left below a folder a week ago or longer: their text has changed.

    A build that is still wanted is taken up by the next run, long before.
    """
    for folder in directory.glob(".*.partial"):
        if not re.fullmatch(r"\.[0-9a-f]{16}(\..*)?\.partial", folder.name):
            continue
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < _FORGOTTEN_SECONDS:
                continue
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


def _private(directory: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    folder.chmod(0o755)
    return folder


def _lock(folder: Path) -> IO[bytes] | None:
    """Own the folder, making it where it is missing; None where another builder owns it."""
    while _HAS_LOCKS:
        folder.mkdir(exist_ok=True)
        try:
            file = (folder / _LOCK).open("ab")
        except FileNotFoundError:  # its builder has just finished and moved it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        try:
            if (folder / _LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:  # its builder moved it between our opening and our locking
            pass
        file.close()
    return None


def _remove_abandoned(directory: Path) -> None:
    for folder in directory.parent.glob(f".{_escaped(directory.name)}.*.partial"):
        if not (folder / _LOCK).exists():
            try:
                if time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS:
                    continue  # perhaps made a moment ago, and not locked yet
            except OSError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            continue
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
