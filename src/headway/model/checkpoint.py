"""A multi-token model on disk: a plain checkpoint of its base, with the heads under `mtp/`.

config.json, generation_config.json           the base's own
model.safetensors(.index.json)                the base's weights and the list of files that engines shall read
mtp/config.json                               versioned: what was added, which base it belongs to, checksum
mtp/heads.safetensors                         heads of offsets 2..n

Where heads are part of the next-token path the base is kept from plain loaders: see `headway.model.base_folder`.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headway.errors import CheckpointError, HeadwayError
from headway.model.base_folder import BASE_FOLDER, INDEX_FILE, base_place, save_base
from headway.model.config import FORMAT_VERSION, MultiTokenConfig
from headway.model.fingerprint import base_fingerprint, dtype_names, same_base, same_tensors, untied_tensors
from headway.model.folder import HEADS_FOLDER, write_folder
from headway.provenance import provenance

CONFIG_FILE = f"{HEADS_FOLDER}/config.json"
HEADS_FILE = f"{HEADS_FOLDER}/heads.safetensors"
_FORMAT = "headway-multi-token"
_FREE_ON_LOAD = {
    "offset_weights",
    "head_init",
    "loss_chunk_tokens",
    "auxiliary_weight",
    "order_window",
    "register_distance",
}
"""Fields of a configuration that say how heads are trained, not what they are."""
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_FOLDERS: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def save_model(
    model: Any,
    save_directory: str | PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None,
    overwrite: bool,
    max_shard_size: int | str,
    **kwargs: Any,
) -> None:
    """See `MultiTokenLM.save_pretrained`."""
    base_state, heads_state = _split(model, state_dict)

    def write(folder: Path) -> None:
        save_base(model, folder, base_state, max_shard_size=max_shard_size, **kwargs)
        _write_heads(model, folder, base_state, heads_state, name=None)

    write_folder(
        save_directory,
        write,
        overwrite=overwrite,
        replaces=("config.json", "model.safetensors", INDEX_FILE, CONFIG_FILE, HEADS_FILE),
        removes=(f"{BASE_FOLDER}/*",),
    )


def save_heads(model: Any, save_directory: str | PathLike[str], *, overwrite: bool) -> None:
    """See `MultiTokenLM.save_heads`."""

    def write(folder: Path) -> None:
        _write_heads(model, folder, *_split(model, None), name=model.name_or_path or None)

    write_folder(save_directory, write, overwrite=overwrite, replaces=("config.json", CONFIG_FILE, HEADS_FILE))


def has_heads(folder: str | PathLike[str]) -> bool:
    """Whether a local folder holds heads."""
    return (Path(folder) / CONFIG_FILE).is_file()


def read_multi_token_config(folder: str | PathLike[str]) -> MultiTokenConfig:
    """What a local folder adds to its base, from `mtp/config.json` alone: no weights are read.

    Raises:
        CheckpointError: the folder has no heads, or the file is damaged or of another version.
    """
    return _multi_token_config(read_record(Path(folder)), Path(folder))


def load_model(cls: Any, source: str | PathLike[str], *, base: Any = None, **kwargs: Any) -> Any:
    """See `MultiTokenLM.from_pretrained`."""
    hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    folder = _local_folder(source, hub_options)
    record = read_record(folder)
    mtp_config = _multi_token_config(record, folder)
    tensors = _read_heads(folder, record)
    if base is None:
        base = _load_base(folder, record, kwargs | hub_options)
    if not same_base(record["base"]["fingerprint"], base):
        raise CheckpointError(
            f"the heads in {folder} belong to another base ({record['base'].get('name') or record['base']['model_type']}): "
            f"the weights of the given one differ from its fingerprint; load the base that the heads were trained with, "
            f"or attach new heads to this one with attach_heads",
            path=folder,
        )
    was_training = base.training
    model = cls(base, mtp_config)
    _load_heads(model, tensors, folder, keep_dtype="dtype" not in kwargs and _as_saved(record, base))
    model.train(was_training)
    _FOLDERS[model] = folder
    return model


def loaded_from(model: Any) -> Path | None:
    """The folder that a model's heads were loaded from; None for a model that was made, or copied, in memory."""
    return _FOLDERS.get(model)


def read_heads_for(model: Any, folder: Path, base_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads of a local folder, checked to fit `model` and to belong to the base whose tensors are given.

    Args:
        model: the multi-token model that they are for; it is not changed.
        folder: a folder that `MultiTokenLM.save_pretrained` wrote.
        base_tensors: state dict of its base, or some of it; only a whole one has a fingerprint to compare.

    Raises:
        CheckpointError: no heads, damaged ones, or heads that do not fit.
    """
    record = read_record(folder)
    recorded, own = _multi_token_config(record, folder).to_dict(), model.mtp_config.to_dict()
    for name in sorted((recorded.keys() | own.keys()) - _FREE_ON_LOAD):
        if recorded.get(name) != own.get(name):
            raise CheckpointError(
                f"the heads in {folder} do not fit the model: they have {name}={recorded.get(name)!r}, the model "
                f"{own.get(name)!r}; load that folder with MultiTokenLM.from_pretrained",
                path=folder,
            )
    tensors = _read_heads(folder, record)
    _check_fit(model, tensors, folder)
    whole = untied_tensors(model.base, model.base.state_dict()).keys() <= base_tensors.keys()
    if whole and not same_tensors(record["base"]["fingerprint"], untied_tensors(model.base, base_tensors)):
        raise CheckpointError(
            f"{folder} mixes two models: its heads were saved with another base than the weights beside them; restore it",
            path=folder,
        )
    return tensors


def _split(model: Any, state_dict: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = model.state_dict() if state_dict is None else state_dict
    foreign = sorted(state.keys() - model.tensor_names)
    if foreign or getattr(model.base, "_hf_peft_config_loaded", False):
        what = f"a state dict with the key {foreign[0]!r}" if foreign else "a base with adapters"
        raise CheckpointError(
            f"cannot save {what}: a multi-token model is saved with the tensors that it was made with, under 'base.' and "
            f"'heads.'; merge adapters (merge_and_unload) and take wrappers off before saving"
        )
    tied = {f"base.{name}" for name in getattr(model.base, "all_tied_weights_keys", None) or {}}
    missing = sorted(model.tensor_names - tied - state.keys())
    if missing:
        raise CheckpointError(
            f"cannot save: the state dict lacks {len(missing)} tensor{'s' if len(missing) > 1 else ''} of the model "
            f"(first: {missing[0]}); pass the whole model's state dict"
        )
    base = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
    heads = {name.removeprefix("heads."): tensor for name, tensor in state.items() if name.startswith("heads.")}
    return base, heads


def _write_heads(
    model: Any, folder: Path, base_state: Mapping[str, Tensor], heads_state: Mapping[str, Tensor], *, name: str | None
) -> None:
    (folder / HEADS_FOLDER).mkdir(exist_ok=True)
    heads_path = folder / HEADS_FILE
    save_file({key: tensor.detach().contiguous() for key, tensor in heads_state.items()}, heads_path, {"format": "pt"})
    write_record(
        folder,
        model.mtp_config,
        model.config,
        base_name=_shareable(name),
        fingerprint=base_fingerprint(model.base, base_state),
        num_tensors=len(heads_state),
    )


def write_record(
    folder: Path,
    mtp_config: MultiTokenConfig,
    base_config: Any,
    *,
    base_name: str | None,
    fingerprint: Mapping[str, str],
    num_tensors: int,
) -> None:
    """Write `mtp/config.json` beside the heads file that is already there.

    Args:
        folder: the model folder; `mtp/heads.safetensors` is in it.
        mtp_config: what was added.
        base_config: configuration of the base.
        base_name: hub name or last name of a folder; a path of this machine means nothing elsewhere.
        fingerprint: `headway.model.fingerprint` of the base's weights.
        num_tensors: tensors in the heads file.
    """
    record = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "multi_token": mtp_config.to_dict(),
        "base": {
            "model_type": base_config.model_type,
            "name": base_name,
            "num_hidden_layers": base_config.num_hidden_layers,
            "hidden_size": base_config.hidden_size,
            "vocab_size": base_config.vocab_size,
            "fingerprint": dict(fingerprint),
        },
        "heads_sha256": _sha256(folder / HEADS_FILE),
        "num_tensors": num_tensors,
        "provenance": {key: value for key, value in provenance().items() if key != "argv"},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shareable(name: str | None) -> str | None:
    """A hub name as it is; of a local path only the last part, since a folder of this machine means nothing elsewhere."""
    if not name:
        return None
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _local_folder(source: str | PathLike[str], hub_options: Mapping[str, Any]) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = fspath(source)
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise CheckpointError(f"there is no model folder {name}; check the path", path=name)
    try:
        return Path(snapshot_download(name, **hub_options))
    except Exception as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a repository that could be fetched ({type(error).__name__}); check the "
            f"name and the connection",
            path=name,
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """The checked contents of `mtp/config.json`.

    Raises:
        CheckpointError: no heads, or a file that is damaged or of another version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        if (folder / HEADS_FILE).exists():
            raise CheckpointError(
                f"{folder} is half written: it has heads but no {CONFIG_FILE}; save it again", path=path
            )
        raise CheckpointError(
            f"{folder} has no heads ({CONFIG_FILE} is missing): it is a plain checkpoint or not a model; load it with "
            f"AutoModelForCausalLM and give it heads with attach_heads",
            path=path,
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, base = record["format_version"], record["base"]
        if (
            record["format"] != _FORMAT
            or not {"fingerprint", "model_type"} <= base.keys()
            or "heads_sha256" not in record
        ):
            raise KeyError("format")
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it or save again", path=path
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this headway reads {FORMAT_VERSION}; use the headway that wrote it",
            path=path,
        )
    return dict(record)


def _multi_token_config(record: Mapping[str, Any], folder: Path) -> MultiTokenConfig:
    try:
        return MultiTokenConfig.from_dict(record["multi_token"])
    except (HeadwayError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error}", path=folder / CONFIG_FILE) from error


def check_heads_file(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare `mtp/heads.safetensors` with the checksum of its record.

    Raises:
        CheckpointError: missing, truncated or changed.
    """
    path = folder / HEADS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is half written: {HEADS_FILE} is missing; save it again", path=path)
    if _sha256(path) != record["heads_sha256"]:
        raise CheckpointError(
            f"{path} is truncated or was changed: its checksum is not the one in {CONFIG_FILE}; restore it or save again",
            path=path,
        )


def _read_heads(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    check_heads_file(folder, record)
    path = folder / HEADS_FILE
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore it or save again", path=path) from error


def _load_base(folder: Path, record: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    needed: dict[str, Any] = {}
    where: Any
    if (folder / "config.json").is_file():
        where, needed = base_place(folder)
    elif any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} is half written: it has weights but no config.json; save it again", path=folder
        )
    else:
        where = record["base"].get("name")
        if not where:
            raise CheckpointError(
                f"{folder} holds heads only and does not name its base; pass base=AutoModelForCausalLM.from_pretrained(...)",
                path=folder,
            )
    try:
        base, report = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **(needed | dict(options)))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the base {where} cannot be loaded: {reason}; restore its files, or pass base=... for a heads-only folder",
            path=where,
        ) from error
    lost = sorted(report.get("missing_keys", ())) + sorted(map(str, report.get("mismatched_keys", ())))
    if lost:
        raise CheckpointError(
            f"the weights in {where} do not fill the base: {len(lost)} tensors are missing or of another shape (first: "
            f"{lost[0]}); restore its files",
            path=where,
        )
    return base


def _as_saved(record: Mapping[str, Any], base: Any) -> bool:
    """Whether the base has the precision that it was saved in; where its config.json asks for another, heads follow it."""
    recorded = record["base"]["fingerprint"].get("dtype")
    return recorded in (None, dtype_names(untied_tensors(base, base.state_dict())))


def _check_fit(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    own = model.heads.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        first = (missing or unexpected or shapes)[0]
        raise CheckpointError(
            f"the heads in {folder} do not fit the model: {len(missing)} tensors missing, {len(unexpected)} too many, "
            f"{len(shapes)} of another shape (first: {first}); the folder mixes two models, restore it",
            path=folder / HEADS_FILE,
        )


def _load_heads(model: Any, tensors: dict[str, Tensor], folder: Path, *, keep_dtype: bool) -> None:
    _check_fit(model, tensors, folder)
    with torch.no_grad():
        if keep_dtype:
            for name, parameter in model.heads.named_parameters():
                parameter.data = parameter.data.to(tensors[name].dtype)
        model.heads.load_state_dict(tensors, strict=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
