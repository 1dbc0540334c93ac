"""Writing a model folder so that an interrupted write never looks like a whole one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

from headway.errors import CheckpointError

HEADS_FOLDER = "mtp"
"""Subfolder of the heads: some engines load every safetensors file at the top of a folder."""

_LAST = ("params.json", "config.json")
"""Without the file of this name no reader takes the folder for a model, so it is moved in last."""

_WEIGHT_PATTERNS = ("model*.safetensors", "model*.safetensors.index.json", "config.json", "generation_config.json")


def write_folder(
    target: str | PathLike[str],
    write: Callable[[Path], None],
    *,
    overwrite: bool,
    replaces: Iterable[str],
    removes: Iterable[str] = (),
) -> None:
    """Let `write` fill a folder beside `target`, then move its files in; `config.json` files come last.

    Args:
        target: the folder to write; files in it that are not the model's are kept.
        write: gets an empty folder.
        overwrite: replace model files that are already there.
        replaces: files, relative to `target`, whose presence means that a model is there.
        removes: patterns of further files, relative to `target`, that go with the old model when it is replaced.

    Raises:
        CheckpointError: a model is there and `overwrite` is off, `target` is a file, or the disk refuses.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, a folder is needed; choose another name", path=target)
    present = [name for name in replaces if (target / name).exists()]
    if present and not overwrite:
        raise CheckpointError(
            f"{target} already holds a model ({present[0]}); nothing was written: choose another folder or pass "
            f"overwrite=True (--overwrite)",
            path=target,
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}; choose a folder you may write", path=target
        ) from error
    try:
        aside.chmod(0o777 & ~_umask())
        write(aside)
        _move_in(aside, target, overwrite=overwrite, removes=removes)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another folder", path=target
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_in(aside: Path, target: Path, *, overwrite: bool, removes: Iterable[str]) -> None:
    if not target.exists() or not any(target.iterdir()):
        aside.replace(target)
        return
    written = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_file()]
    if overwrite:
        # The old configurations go first: from here on the folder is visibly incomplete until the last move.
        for folder in {path.parent for path in written}:
            (target / folder / "config.json").unlink(missing_ok=True)
            for pattern in _WEIGHT_PATTERNS:
                for stale in (target / folder).glob(pattern):
                    stale.unlink()
        for pattern in removes:
            for stale in sorted(target.glob(pattern), key=lambda path: (path.name not in _LAST, path)):
                if stale.is_file():
                    stale.unlink()
                    if stale.parent != target and not any(stale.parent.iterdir()):
                        stale.parent.rmdir()
    for path in sorted(written, key=lambda path: (path.name in _LAST, path.parent == Path(), path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (aside / path).replace(target / path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
