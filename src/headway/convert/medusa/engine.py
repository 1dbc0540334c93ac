"""Format `medusa-engine`: Medusa heads as serving engines load them, one safetensors file.

With `original_lm_head` all heads use one output matrix, which the file holds as `lm_heads.0.weight`.

Source: vLLM 0.32, transformers_utils/configs/medusa.py and model_executor/models/medusa.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.convert.lazy_model import LazyModel, LazyTensor, WeightChange
from headway.convert.medusa.forward import medusa_logits
from headway.convert.medusa.heads_folder import (
    BASE_KEY,
    CONFIG_FILE,
    count,
    heads_alone,
    named_base,
    read_heads,
    read_json,
    unembedding_of_base,
)
from headway.convert.medusa.tensors import TOKEN_MAP, MedusaTensors, sort_tensors
from headway.convert.plain_folder import common_dtype, read_plain
from headway.convert.safetensors_files import SINGLE_FILE, open_safetensors, write_safetensors
from headway.convert.sidecar import SIDECAR_FILE, write_sidecar
from headway.errors import CheckpointError, IncompatibleModelError

MODEL_TYPE = "medusa"


class MedusaEngineFolder:
    """See the module."""

    name = "medusa-engine"
    marker = CONFIG_FILE
    files = (CONFIG_FILE, SINGLE_FILE, SIDECAR_FILE)
    holds_heads = True
    holds_base = False
    is_hugging_face = False

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`."""
        return named_base(folder)

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`."""
        values = read_json(folder)
        if values.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} must say model_type='medusa': got {values.get('model_type')!r}; it is no folder of "
                f"Medusa heads in the layout of engines",
                path=folder,
            )
        tensors = _open(folder, values)
        _check_heads(values, folder)
        path = folder / CONFIG_FILE
        notes: tuple[str, ...] = ()
        for names, held in (
            (("medusa_num_heads", "num_heads"), tensors.num_heads),
            (("medusa_num_layers", "num_hidden_layers"), tensors.num_blocks),
        ):
            for name in names:
                notes += count(values, name, held, path)
        if base is None or not values.get("original_lm_head"):
            return read_heads(folder, base, tensors, shared=False, notes=notes)
        if _is_of_base(tensors.unembeddings[0], base):
            return read_heads(folder, base, tensors, shared=True, notes=notes)
        notes += ("the one output matrix of all heads is not the base's: each offset has a copy of it now",)
        return read_heads(folder, base, tensors, shared=False, notes=notes)

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: Medusa heads."""
        return heads_alone(model, self.name)

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`."""
        shared = model.mtp_config.own_unembedding is False
        dtype = common_dtype(model.heads)
        tensors = {_name(name): tensor for name, tensor in model.heads.items()}
        if shared:
            tensors["lm_heads.0.weight"] = unembedding_of_base(model).to(dtype)
        write_safetensors(folder / SINGLE_FILE, tensors)
        write_sidecar(model, folder)
        values = {
            "architectures": ["MedusaModel"],
            "model_type": MODEL_TYPE,
            BASE_KEY: model.base_name,
            "hidden_size": model.config.hidden_size,
            "vocab_size": model.config.vocab_size,
            "medusa_num_heads": model.num_future_tokens - 1,
            "medusa_num_layers": model.mtp_config.blocks_per_head,
            "medusa_fc_bias": True,
            "original_lm_head": shared,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return ("engines draft one chain of the likeliest tokens from it; vLLM dropped this layout in 0.33",)

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`."""
        assert base is not None
        return medusa_logits(base, _open(folder, read_json(folder)), tokens_BT, change=change)


def _name(name: str) -> str:
    """The engines' name of a tensor of the heads.

    >>> _name("2.0.inner.weight"), _name("unembeddings.2.weight")
    ('blocks.2.layers.0.weight', 'lm_heads.2.weight')
    """
    if name.startswith("unembeddings."):
        return name.replace("unembeddings.", "lm_heads.")
    head, block, _, what = name.split(".")
    return f"blocks.{head}.layers.{block}.{what}"


def _open(folder: Path, values: Mapping[str, Any]) -> MedusaTensors:
    if not (folder / SINGLE_FILE).is_file():
        raise CheckpointError(f"{folder} has no {SINGLE_FILE}: it is half written; restore it", path=folder)
    found: dict[str, LazyTensor] = open_safetensors(folder / SINGLE_FILE)
    if TOKEN_MAP in found:
        raise IncompatibleModelError(
            f"the heads in {folder} predict a part of the vocabulary alone ({TOKEN_MAP}), which headway's heads cannot "
            f"hold: a token without a row has no finite logit; use the checkpoint from before the vocabulary was cut"
        )
    tensors = sort_tensors(found, str(folder))
    wanted = {0} if values.get("original_lm_head") else set(range(tensors.num_heads))
    if tensors.unembeddings.keys() != wanted:
        raise CheckpointError(
            f"{folder} must hold the output matrices {', '.join(f'lm_heads.{head}' for head in sorted(wanted))} "
            f"(original_lm_head={bool(values.get('original_lm_head'))}): it holds "
            f"{', '.join(f'lm_heads.{head}' for head in sorted(tensors.unembeddings)) or 'none'}; restore it",
            path=folder,
        )
    if values.get("original_lm_head"):
        one = tensors.unembeddings[0]
        return replace(tensors, unembeddings=dict.fromkeys(range(tensors.num_heads), one))
    return tensors


def _check_heads(values: Mapping[str, Any], folder: Path) -> None:
    vocabulary, cut = values.get("vocab_size"), values.get("truncated_vocab_size")
    scale = values.get("logit_scale", 1.0)
    reasons = []
    if cut is not None and cut != vocabulary:
        reasons.append(f"they predict {cut} of {vocabulary} tokens (truncated_vocab_size)")
    if scale != 1.0:
        reasons.append(f"their logits are scaled (logit_scale={scale})")
    if reasons:
        raise IncompatibleModelError(
            f"headway's heads cannot hold those in {folder} exactly: {'; '.join(reasons)}; use the checkpoint that they "
            f"were made from"
        )


def _is_of_base(one: LazyTensor, base: Path) -> bool:
    unembedding = unembedding_of_base(read_plain(base))
    return unembedding.shape == one.shape and torch.equal(unembedding.to(one.dtype).read(), one.read())
