"""What the two Medusa layouts share: heads without their base, which stays in its own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headway.convert.architecture import PLAIN, architecture, check_complete
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.convert.medusa.tensors import MedusaTensors
from headway.convert.plain_folder import read_plain
from headway.convert.sidecar import check_fingerprint, read_sidecar
from headway.errors import CheckpointError, IncompatibleModelError
from headway.heads.options import HeadOptions
from headway.model.config import MultiTokenConfig

CONFIG_FILE = "config.json"
BASE_KEY = "base_model_name_or_path"

_HELD = frozenset({"blocks_per_head", "own_unembedding"})


def read_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); restore it", path=path) from error
    return values


def count(values: Mapping[str, Any], name: str, held: int, path: Path) -> tuple[str, ...]:
    """Hold a number of config.json to what the weights hold; the weights are right where they hold more.

    The released Vicuna heads say 2 heads and hold 5.

    Returns:
        A note where they differ.

    Raises:
        CheckpointError: fewer than config.json says.
    """
    said = values.get(name)
    if said is None or said == held:
        return ()
    if isinstance(said, bool) or not isinstance(said, int) or said > held:
        raise CheckpointError(f"{path} says {name}={said!r}, the weights hold {held}; restore the one that is wrong")
    return (f"{path.name} says {name}={said}, the weights hold {held}: all of them were read",)


def read_heads(
    folder: Path,
    base: Path | None,
    tensors: MedusaTensors,
    *,
    shared: bool,
    notes: tuple[str, ...],
) -> LazyModel:
    """Heads and their base as one model.

    Args:
        folder: of the heads.
        base: of the plain base.
        tensors: sorted.
        shared: whether the offsets use the base's unembedding.
        notes: for the report.

    Raises:
        CheckpointError: no base; heads that do not fit it, or that were made for another one.
    """
    if base is None:
        raise CheckpointError(
            f"{folder} holds heads alone; pass the folder or the hub name of their base with --base", path=folder
        )
    plain = read_plain(base)
    mtp_config = MultiTokenConfig(
        num_future_tokens=tensors.num_heads + 1,
        heads="medusa",
        blocks_per_head=tensors.num_blocks,
        own_unembedding=False if shared else None,
    )
    heads = tensors.to_heads()
    if not shared:
        heads |= {f"unembeddings.{head}.weight": tensor for head, tensor in tensors.unembeddings.items()}
    needed = architecture(plain.config, mtp_config).heads
    check_complete(heads, needed, str(folder), unknown=sorted(heads.keys() - needed.keys()))
    record = read_sidecar(folder)
    if record is not None:
        if replace(record.mtp_config, offset_weights=None, head_init="copy", loss_chunk_tokens=1024) != mtp_config:
            raise CheckpointError(
                f"{record.path} describes other heads than the weights beside it; delete the one that does not belong here",
                path=record.path,
            )
        check_fingerprint(record, plain, folder)
        mtp_config = record.mtp_config
    else:
        notes += ("nothing in the folder says which weights of the base the heads were trained with; check its name",)
    if tensors.without_bias:
        notes += ("the blocks have no bias: it is zero, which is the same",)
    name = (record.base_name if record is not None else None) or named_base(folder)
    name = name if name and not Path(name).is_absolute() and not name.startswith(".") else plain.base_name
    return replace(plain, mtp_config=mtp_config, heads=heads, base_name=name, notes=plain.notes + notes)


def named_base(folder: Path) -> str | None:
    """The base that config.json names: of the hub, or a folder."""
    name = read_json(folder).get(BASE_KEY) if (folder / CONFIG_FILE).is_file() else None
    return name if isinstance(name, str) and name else None


def heads_alone(model: LazyModel, layout: str) -> LazyModel:
    """The heads of a model, with its base put aside.

    Raises:
        IncompatibleModelError: not heads that a Medusa layout holds.
    """
    differs = [] if model.mtp_config.heads == "medusa" else [f"heads={model.mtp_config.heads!r}"]
    if model.num_future_tokens == 1:
        differs = ["no heads"]
    default = HeadOptions()
    options = model.mtp_config.head_options
    differs += [
        f"{name}={value!r}"
        for name, value in vars(options).items()
        if name not in _HELD and value != getattr(default, name)
    ]
    if getattr(model.config, "final_logit_softcapping", None):
        differs.append(f"soft-capped logits (final_logit_softcapping={model.config.final_logit_softcapping})")
    if differs:
        raise IncompatibleModelError(
            f"{layout} layout holds Medusa heads alone, residual SiLU blocks on the base's final hidden state: got "
            f"{', '.join(differs)}; write it as --to headway, or as --to hf without heads"
        )
    note = "the base is not in this layout: it stays where it is (or write it with --to hf)"
    return replace(model, base={}, apart=model.whole_base, notes=(*model.notes, note))


def unembedding_of_base(model: LazyModel) -> LazyTensor:
    """The output matrix of the base, tied or not."""
    needed = architecture(model.config, PLAIN)
    base = model.whole_base
    return base.get("lm_head.weight") or base[needed.tied.get("lm_head.weight", "")]
