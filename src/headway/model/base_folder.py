"""The base's part of a model folder: plain at the top, or kept from plain loaders.

A base whose next-token path runs through its heads (anticausal wiring) is no model by itself: loaded plainly it would
run and predict wrongly. Its folder therefore has at the top a config.json of a model type that no plain loader knows, with
the base's own configuration inside, and the base's weights under `mtp/base/` without a config.json. The index at the top
points there, for the Hugging Face Trainer: it looks for nothing else when it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from headway.errors import CheckpointError
from headway.model.folder import HEADS_FOLDER

BASE_FOLDER = f"{HEADS_FOLDER}/base"
INDEX_FILE = "model.safetensors.index.json"
SPLICED_MODEL_TYPE = "headway_multi_token"
"""`model_type` of a folder that only headway can load."""

_WHY = (
    "the heads of this model are part of its next-token path; load it with headway.MultiTokenLM.from_pretrained, or "
    "export a plain model with headway.model.stack.plain_stack"
)


def save_base(model: Any, folder: Path, state: Mapping[str, Tensor], **options: Any) -> None:
    """Write configuration and weights of the base into a model folder.

    Args:
        model: a `MultiTokenLM`.
        folder: the model folder.
        state: weights of the base.
        options: for the base's own `save_pretrained`.
    """
    if not model.mtp_config.changes_base:
        model.base.save_pretrained(folder, state_dict=dict(state), **options)
        _write_index(folder)
        return
    inner = folder / BASE_FOLDER
    model.base.save_pretrained(inner, state_dict=dict(state), **options)
    _write_index(inner)
    hide_config(folder)


def hide_config(folder: Path) -> None:
    """Turn `mtp/base/config.json` into a config.json at the top that plain loaders refuse; the folder is whole after it."""
    inner = folder / BASE_FOLDER
    own = inner / "config.json"
    document = {
        "model_type": SPLICED_MODEL_TYPE,
        "architectures": ["MultiTokenLM"],
        "why": _WHY,
        "base_config": json.loads(own.read_text(encoding="utf-8")),
    }
    own.unlink()
    index = json.loads((inner / INDEX_FILE).read_text(encoding="utf-8"))
    index["weight_map"] = {name: f"{BASE_FOLDER}/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_place(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the base of a folder with a config.json is, and what `AutoModelForCausalLM.from_pretrained` needs beside it.

    Raises:
        CheckpointError: a damaged configuration or a missing file of weights.
    """
    inner = _inner_config(folder)
    place = folder if inner is None else folder / BASE_FOLDER
    _check_index(place)
    return place, {} if inner is None else {"config": _config(folder, inner)}


def read_base_config(folder: Path) -> Any:
    """The Hugging Face configuration of a folder's base, plain or not.

    Raises:
        CheckpointError: a damaged configuration of a folder that only headway can load.
    """
    inner = _inner_config(folder)
    return AutoConfig.from_pretrained(folder) if inner is None else _config(folder, inner)


def _inner_config(folder: Path) -> dict[str, Any] | None:
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if document.get("model_type") != SPLICED_MODEL_TYPE:
            return None
        return dict(document["base_config"])
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged: base_config is missing; restore it or save again",
            path=folder / "config.json",
        ) from error
    except (ValueError, TypeError, AttributeError):
        # Not for us to judge: the plain loader says what is wrong with a plain configuration.
        return None


def _config(folder: Path, values: dict[str, Any]) -> Any:
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # transformers lets whatever a damaged file causes escape
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a base: {type(error).__name__}: {error}; restore it or save again",
            path=folder / "config.json",
        ) from error


def _write_index(folder: Path) -> None:
    index = folder / INDEX_FILE
    if index.exists():
        return
    weight_map, total = {}, 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            weight_map[name] = "model.safetensors"
            tensor = file.get_tensor(name)
            total += tensor.numel() * tensor.element_size()
    index.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    )


def _check_index(folder: Path) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); restore it or save again", path=path
        ) from error
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is half written: {name} is missing; restore it or save again", path=folder / name
            )
