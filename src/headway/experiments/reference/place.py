"""Where the reference model lies, in the project's repository beside the package, and prompts for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headway.data.sources import standard_library
from headway.errors import CheckpointError
from headway.experiments.demo.corpus import held_out_prompts
from headway.experiments.demo.generation import DemoPrompt

FOLDER = Path("reference") / "model"
"""Below the top of the repository; the installed package does not hold it."""

RECORD = "reference.json"
"""In the model's folder: what it was trained on and how, see `headway.experiments.reference.publish`."""


def checkout() -> Path:
    """The top of the repository, where the package runs from one; elsewhere a folder that says nothing."""
    return Path(__file__).resolve().parents[4]


def reference_model(places: Iterable[Path] | None = None) -> Path:
    """The folder of the reference model.

    Args:
        places: tops of repositories to look in; by default the one that the package runs from, then the working directory.

    Raises:
        CheckpointError: in none of them.
    """
    for place in (checkout(), Path.cwd()) if places is None else places:
        if (place / FOLDER / RECORD).is_file():
            return place / FOLDER
    raise CheckpointError(
        f"the reference model is not here: it is part of headway's repository ({FOLDER.as_posix()}), not of the installed "
        f"package; run this in a clone of the repository, or name a MODEL"
    )


def reference_record(folder: Path) -> dict[str, Any]:
    """What is written about the model beside it.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(record["data"]["held_out_packages"], list):
            raise KeyError("held_out_packages")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RECORD} is missing or damaged ({type(error).__name__}); restore it", path=folder
        ) from error
    return dict(record)


def reference_prompts(folder: Path, *, count: int, prompt_bytes: int) -> list[DemoPrompt]:
    """Functions of the running interpreter's library, from packages that the model has never seen.

    The packages are named in the model's record, so that another Python, whose library would be split otherwise, holds out
    the same ones.

    Args:
        folder: of the reference model.
        count: prompts wanted.
        prompt_bytes: length of each.

    Raises:
        CheckpointError: no record.
        DataError: this interpreter has too little of these packages, or no library source.
    """
    held_out = set(reference_record(folder)["data"]["held_out_packages"])
    documents = [document for document in standard_library() if document.group in held_out]
    return held_out_prompts(documents, count=count, prompt_bytes=prompt_bytes)
