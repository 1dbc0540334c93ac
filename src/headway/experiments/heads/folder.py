"""The folder of a comparison; its mark says how its models are trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.errors import ConfigError
from headway.experiments.demo.folder import write_json

MARK = "headway-heads.json"
"""A file of this name says that a comparison of heads wrote the folder; it holds how models are trained."""


def claim_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Begin a comparison in a folder, or go on with the one that it holds.

    Args:
        folder: missing or empty, or an earlier comparison.
        settings: how its models are trained.
        overwrite: delete the earlier comparison first.

    Raises:
        ConfigError: the folder holds something else, or a comparison with other settings.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"the comparison needs a folder of its own: {folder} is a file or a link; give another --output"
        )
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if names and MARK not in names:
        raise ConfigError(
            f"the comparison needs a folder of its own: {folder} holds files that no comparison wrote "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); give another --output"
        )
    if names and not overwrite:
        _check_same(folder, settings)
        return
    for name in names:
        # The mark goes last: an interrupted deletion still leaves a folder that the next comparison may take.
        if name != MARK:
            entry = folder / name
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, {"finished": False, "training": dict(settings)})


def finish_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say in the mark that the folder holds a whole comparison."""
    write_json(folder / MARK, {"finished": True, "training": dict(settings)})


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        saved = json.loads((folder / MARK).read_text(encoding="utf-8"))["training"]
        # As a file gives them back: JSON knows no tuples.
        wanted = json.loads(json.dumps(settings))
        changed = [
            f"{name} was {saved.get(name)}, is {wanted.get(name)}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / MARK} is damaged; pass --overwrite to begin anew or give another --output"
        ) from error
    if changed:
        raise ConfigError(
            f"{folder} holds a comparison with other settings ({'; '.join(changed)}); give another --output, or pass "
            f"--overwrite to begin anew"
        )
