"""The folder of format `transformers-mtp`.

Reads sequential modules as released checkpoints carry them (see `tensors`) beside a dense base: MiMo-7B, the families that
heads attach to, and what this format writes. Writes what plain transformers drafts with: see `carriers`. The family's own
configuration goes to headway.json beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from headway.convert.architecture import PLAIN, architecture, check_complete, match_base
from headway.convert.lazy_model import LazyModel, LazyTensor, WeightChange
from headway.convert.plain_folder import (
    PLAIN_FILES,
    base_name,
    common_dtype,
    load_plain,
    read_generation,
    write_generation,
)
from headway.convert.safetensors_files import open_checkpoint, write_checkpoint
from headway.convert.sequential.carriers import carrier, family_config, is_carrier, same_model
from headway.convert.sequential.forward import native_logits, transformers_logits
from headway.convert.sequential.tensors import (
    SequentialTensors,
    halves_swapped,
    sort_tensors,
    written_name,
)
from headway.convert.sidecar import SIDECAR_FILE, Sidecar, read_sidecar, write_sidecar
from headway.errors import CheckpointError, IncompatibleModelError
from headway.heads.options import HeadOptions
from headway.model.config import MultiTokenConfig

CONFIG_FILE = "config.json"
_COUNTS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
_HELD = frozenset({"share_modules", "own_output_norm"})


class TransformersMtpFolder:
    """See the module."""

    name = "transformers-mtp"
    marker = CONFIG_FILE
    files = (*PLAIN_FILES, SIDECAR_FILE)
    holds_heads = True
    holds_base = True
    is_hugging_face = True

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`: it holds its base."""
        return None

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`."""
        values = _read_values(folder)
        record = read_sidecar(folder)
        config = _config(values, record, folder)
        tensors = _open(folder, values, config)
        needed = architecture(config, PLAIN)
        plain, left_out = match_base(tensors.base, needed, str(folder))
        left_out += tensors.left_out + _repeated(tensors, plain, needed.tied, folder)
        mtp_config = MultiTokenConfig(
            num_future_tokens=len(tensors.modules) + 1, heads="sequential", own_output_norm=True
        )
        heads = tensors.to_heads()
        shapes = architecture(config, mtp_config).heads
        check_complete(heads, shapes, str(folder), unknown=sorted(heads.keys() - shapes.keys()))
        if record is not None:
            mtp_config = _recorded(record, mtp_config)
        return LazyModel(
            config=config,
            mtp_config=mtp_config,
            base=plain,
            heads=heads,
            base_name=(record.base_name if record is not None else None) or base_name(folder),
            generation=read_generation(folder),
            left_out=left_out,
            notes=_counted(values, len(tensors.modules)),
        )

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: modules that each have their own weights and end with a norm of their own."""
        _check_heads(model)
        count = model.num_future_tokens - 1
        carrier(model.config, num_modules=count)
        heads, notes = dict(model.heads), model.notes
        if model.mtp_config.share_modules and count > 1:
            heads |= {
                f"{index}.{name.removeprefix('0.')}": tensor
                for index in range(1, count)
                for name, tensor in heads.items()
            }
            notes += (f"the shared module is written {count} times, since the layout has no sharing",)
        if not model.mtp_config.own_output_norm:
            norm = next(name for name in model.base if name.endswith(".norm.weight"))
            heads["0.output_norm.weight"] = model.base[norm]
            notes += ("the module's output norm is a copy of the base's final norm from now on",)
        mtp_config = replace(model.mtp_config, share_modules=False, own_output_norm=True)
        return replace(model, mtp_config=mtp_config, heads=heads, notes=notes)

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`."""
        made = carrier(model.config, num_modules=model.num_future_tokens - 1)
        needed = architecture(model.config, PLAIN)
        layers = int(model.config.num_hidden_layers)
        tensors = {needed.on_disk(name): tensor for name, tensor in model.base.items()}
        tensors |= {
            written_name(name, made.prefix, num_layers=layers): halves_swapped(tensor)
            if name.endswith(".projection.weight")
            else tensor
            for name, tensor in model.heads.items()
        }
        write_checkpoint(folder, tensors, always_index=False)
        if model.generation is not None:
            write_generation(model.generation, folder)
        write_sidecar(model, folder, config=model.config.to_dict())
        made.config.architectures = [made.class_name]
        made.config.dtype = common_dtype(model.base)
        made.config.save_pretrained(folder)
        return (
            f"transformers runs this {model.config.model_type} model as {made.class_name}, a class for which "
            f"generate(use_mtp=True) works (batch size 1)",
        )

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`: with transformers' own modules where it has them."""
        values = _read_values(folder)
        if is_carrier(values):
            return transformers_logits(load_plain(folder), tokens_BT, change=change)
        config = _config(values, None, folder)
        return native_logits(load_plain(folder, config=config), _open(folder, values, config), tokens_BT, change=change)


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); restore it", path=path) from error
    return values


def _config(values: Mapping[str, Any], record: Sidecar | None, folder: Path) -> Any:
    path = folder / CONFIG_FILE
    try:
        config = family_config(values)
        if record is None or record.config is None:
            return config
        own = CONFIG_MAPPING[record.config["model_type"]].from_dict(dict(record.config))
    except IncompatibleModelError:
        raise
    except Exception as error:  # transformers lets whatever a senseless value causes escape
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path} does not describe a model: {reason}; restore it", path=path) from error
    if not same_model(config, own):
        raise CheckpointError(
            f"{record.path} describes another model than {path}; delete the one that does not belong here", path=path
        )
    return own


def _open(folder: Path, values: Mapping[str, Any], config: Any) -> SequentialTensors:
    return sort_tensors(
        open_checkpoint(folder),
        num_layers=int(config.num_hidden_layers),
        hidden_first=bool(values.get("mtp_hidden_states_first")),
        where=str(folder),
    )


def _repeated(
    tensors: SequentialTensors, base: Mapping[str, LazyTensor], tied: Mapping[str, str], folder: Path
) -> tuple[str, ...]:
    left_out = []
    for name, (of_base, tensor) in tensors.repeated.items():
        known = base.get(of_base) or base[tied[of_base]]
        if known.shape != tensor.shape or not torch.equal(known.read(), tensor.read()):
            raise IncompatibleModelError(
                f"{name} in {folder} is not the base's {of_base}: headway's sequential modules share embedding and output "
                f"matrix with the base; train them so, or use the engine that the checkpoint was made for"
            )
        left_out.append(f"{name}: repeats {of_base}, which the modules share")
    return tuple(left_out)


def _recorded(record: Sidecar, found: MultiTokenConfig) -> MultiTokenConfig:
    told = record.mtp_config
    if (told.num_future_tokens, told.heads) != (found.num_future_tokens, found.heads):
        raise CheckpointError(
            f"{record.path} describes other modules than the weights beside it; delete the one that does not belong here",
            path=record.path,
        )
    return told


def _counted(values: Mapping[str, Any], held: int) -> tuple[str, ...]:
    said = next((values[name] for name in _COUNTS if values.get(name) is not None), None)
    if said is None or said == held:
        return ()
    return (f"{CONFIG_FILE} says {said} modules, the weights hold {held}: all of them were read",)


def _check_heads(model: LazyModel) -> None:
    config = model.mtp_config
    differs = [] if config.heads == "sequential" else [f"heads={config.heads!r}"]
    if model.num_future_tokens == 1:
        differs = ["no heads"]
    default = HeadOptions()
    differs += [
        f"{name}={value!r}"
        for name, value in vars(config.head_options).items()
        if name not in _HELD and value != getattr(default, name)
    ]
    if differs:
        raise IncompatibleModelError(
            f"transformers-mtp layout holds sequential modules alone: got {', '.join(differs)}; write it as --to headway, or "
            f"as --to hf without heads"
        )
    if not config.own_output_norm and model.num_future_tokens > 2:
        raise IncompatibleModelError(
            f"in transformers-mtp layout a module hands its normed output to the next one, these hand on what comes before "
            f"the norm (own_output_norm=False): with num_future_tokens={model.num_future_tokens} that is another model; keep "
            f"one module (--num-future-tokens 2), train with own_output_norm, or write it as --to headway"
        )
