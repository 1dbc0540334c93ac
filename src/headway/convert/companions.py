"""The files that travel with a model: tokenizer, licence, model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
PAPERS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "README*", "MODEL_CARD*", "CITATION*")

TRAVELLING = (*TOKENIZER_FILES, *PAPERS)
"""Patterns of file names, whatever the formats."""


@dataclass(frozen=True)
class Companions:
    """What stood beside the weights.

    Attributes:
        copied: names of files that travelled along.
        left_behind: names that did not; folders end with a slash.
        places: name -> the folder that a copied file is taken from.
    """

    copied: tuple[str, ...]
    left_behind: tuple[str, ...]
    places: Mapping[str, Path]


def find_companions(source: Path, model_files: Iterable[str], *, base: Path | None = None) -> Companions:
    """Sort what stands in a folder beside the model's own files.

    Args:
        source: the folder.
        model_files: patterns of the model's own files.
        base: folder of the base of heads alone: what travels is taken from there too, but its tokenizer not where the
            source has one.
    """
    patterns = tuple(model_files)
    copied: list[str] = []
    left_behind: list[str] = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or any(fnmatchcase(path.name, pattern.split("/")[0]) for pattern in patterns):
            continue
        travels = path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TRAVELLING)
        (copied if travels else left_behind).append(path.name if path.is_file() else f"{path.name}/")
    places = dict.fromkeys(copied, source)
    if base is not None:
        has_tokenizer = any(name in TOKENIZER_FILES for name in copied)
        for path in sorted(base.iterdir()):
            travels = path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TRAVELLING)
            if travels and path.name not in places and not (has_tokenizer and path.name in TOKENIZER_FILES):
                places[path.name] = base
    return Companions(tuple(sorted(places)), tuple(left_behind), places)


def copy_companions(companions: Companions, target: Path) -> None:
    """Copy the files that travel; a link, as the hub's cache has them, becomes the file that it points to."""
    for name, place in companions.places.items():
        shutil.copyfile(place / name, target / name)
