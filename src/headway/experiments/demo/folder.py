"""The demo's own folder: made new for every demo, never at the cost of anything else.

Rules, in order:
- a folder that does not exist or is empty is taken;
- a folder that holds a demo (its mark is in it) is emptied and taken when the caller allows it;
- any other folder is refused: nothing that a demo did not write is ever deleted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from headway.errors import ConfigError

MARK = "headway-demo.json"
"""A file of this name says that a demo wrote the folder; it holds where the demo stands."""


def claim_folder(folder: Path, *, replace_demo: bool) -> None:
    """Make the folder ready for a new demo and put the mark of an unfinished demo in it.

    Args:
        folder: where the demo goes; missing parents are made.
        replace_demo: whether an earlier demo in it may be deleted.

    Raises:
        ConfigError: the folder holds something that may not be deleted, or is a file.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"the demo needs a folder of its own: {folder} is a file or a link; give another --output")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if names and MARK not in names:
        raise ConfigError(
            f"the demo needs a folder of its own: {folder} holds files no demo wrote ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}); give another --output"
        )
    if names and not replace_demo:
        raise ConfigError(f"{folder} holds an earlier demo; pass --overwrite to replace it or give another --output")
    for name in names:
        # The mark goes last: an interrupted deletion still leaves a folder that the next demo may take.
        if name != MARK:
            entry = folder / name
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, {"finished": False})


def finish_folder(folder: Path) -> None:
    """Say in the mark that the folder holds a whole demo."""
    write_json(folder / MARK, {"finished": True})


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document whole or not at all."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
