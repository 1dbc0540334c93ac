"""Format `headway`: a plain checkpoint of the base with the heads under `mtp/`, or the heads alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from headway.convert.architecture import architecture, check_complete
from headway.convert.lazy_model import LazyModel, WeightChange
from headway.convert.plain_folder import (
    PLAIN_FILES,
    base_name,
    base_writing_order,
    change_weights,
    load_plain,
    read_plain,
    write_base,
    write_config,
)
from headway.convert.safetensors_files import open_safetensors, write_safetensors
from headway.errors import CheckpointError
from headway.model.base_folder import BASE_FOLDER, base_place, hide_config, read_base_config
from headway.model.checkpoint import (
    CONFIG_FILE,
    HEADS_FILE,
    check_heads_file,
    read_multi_token_config,
    read_record,
    write_record,
)
from headway.model.fingerprint import FingerprintBuilder, same_fingerprint
from headway.model.folder import HEADS_FOLDER
from headway.model.multi_token_lm import MultiTokenLM


class HeadwayFolder:
    """See the module."""

    name = "headway"
    marker = CONFIG_FILE
    files = (*PLAIN_FILES, CONFIG_FILE, HEADS_FILE, f"{BASE_FOLDER}/*")
    holds_heads = True
    holds_base = True
    is_hugging_face = True

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`."""
        if (folder / "config.json").is_file():
            return None
        name = read_record(folder)["base"].get("name")
        return str(name) if name else None

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`; the base is compared with the fingerprint that the heads recorded of theirs."""
        record = read_record(folder)
        mtp_config = read_multi_token_config(folder)
        check_heads_file(folder, record)
        alone = not (folder / "config.json").is_file()
        if alone and base is None:
            name = record["base"].get("name")
            raise CheckpointError(
                f"{folder} holds heads alone; pass the folder of their base with --base"
                + (f" (they were made for {name})" if name else ""),
                path=folder,
            )
        if not alone and base is not None:
            raise CheckpointError(f"{folder} holds its base; leave --base out, it is for heads alone", path=folder)
        if alone and base is not None:
            plain = read_plain(base)
        else:
            place, _ = base_place(folder)
            plain = read_plain(place, config=read_base_config(folder) if place != folder else None)
            plain = replace(plain, base_name=base_name(folder))
        heads = open_safetensors(folder / HEADS_FILE)
        needed = architecture(plain.config, mtp_config).heads
        unknown = sorted(heads.keys() - needed.keys())
        check_complete(heads, needed, str(folder / HEADS_FILE), unknown=unknown)
        _check_base(record, plain, folder)
        recorded = record["base"].get("name")
        return replace(plain, mtp_config=mtp_config, heads=heads, base_name=recorded or plain.base_name)

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: everything."""
        return model

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`; the fingerprint of the base is taken while its tensors pass by."""
        fingerprint = FingerprintBuilder()
        order = base_writing_order(model)
        one_pass = order == sorted(order)
        if not one_pass:
            for name in sorted(order):
                fingerprint.add(name, model.base[name].read())
        (folder / HEADS_FOLDER).mkdir()
        place = folder / BASE_FOLDER if model.mtp_config.changes_base else folder
        place.mkdir(exist_ok=True)
        if place != folder and model.generation is None:
            # transformers loads a base without a config.json beside it only with these.
            model = replace(model, generation=GenerationConfig.from_model_config(model.config).to_dict())
        write_base(model, place, always_index=True, written=fingerprint.add if one_pass else None)
        write_safetensors(folder / HEADS_FILE, model.heads)
        write_record(
            folder,
            model.mtp_config,
            model.config,
            base_name=model.base_name,
            fingerprint=fingerprint.fingerprint(),
            num_tensors=len(model.heads),
        )
        write_config(model, place)
        if place != folder:
            hide_config(folder)
        return ()

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`."""
        causal_lm = None if base is None else load_plain(base)
        model = MultiTokenLM.from_pretrained(folder, base=causal_lm, dtype=torch.float32).eval()
        change_weights(model, change)
        with torch.no_grad():
            logits_BTNV: Tensor = model(tokens_BT, return_future_logits=True, use_cache=False).future_logits
        return logits_BTNV


def _check_base(record: Mapping[str, Any], plain: LazyModel, folder: Path) -> None:
    fingerprint = FingerprintBuilder()
    for name in sorted(plain.base):
        fingerprint.add(name, plain.base[name].read())
    if not same_fingerprint(record["base"]["fingerprint"], fingerprint.fingerprint()):
        raise CheckpointError(
            f"the heads in {folder} belong to another base ({record['base'].get('name') or record['base']['model_type']}): "
            f"the weights of this one differ from its fingerprint; convert with the base that the heads were trained with",
            path=folder,
        )
