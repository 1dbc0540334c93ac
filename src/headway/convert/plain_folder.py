"""Format `hf`: a plain Hugging Face checkpoint, without a trace of heads."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from headway.convert.architecture import PLAIN, Architecture, architecture, match_base
from headway.convert.lazy_model import LazyModel, LazyTensor, WeightChange
from headway.convert.recognise import looks_like
from headway.convert.safetensors_files import INDEX_FILE, SINGLE_FILE, open_checkpoint, write_checkpoint, writing_order
from headway.convert.stack import plain_stack
from headway.errors import CheckpointError
from headway.model.checkpoint import has_heads

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PLAIN_FILES = (CONFIG_FILE, GENERATION_FILE, SINGLE_FILE, "model-*-of-*.safetensors", INDEX_FILE)


class PlainFolder:
    """See the module."""

    name = "hf"
    marker = CONFIG_FILE
    files = PLAIN_FILES
    holds_heads = False
    holds_base = True
    is_hugging_face = True

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`: it holds its base."""
        return None

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`; a folder with heads is refused, since they would be lost silently."""
        if has_heads(folder):
            raise CheckpointError(
                f"{folder} holds heads (mtp/), which the format hf would leave behind; read it as --from headway",
                path=folder,
            )
        try:
            return read_plain(folder)
        except CheckpointError as error:
            other = looks_like(folder)
            if other in (None, self.name):
                raise
            raise CheckpointError(f"{error}; it looks like --from {other}", path=folder) from error

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: the base, or the whole stack of layers where the next token needs the heads."""
        return plain_stack(model) if model.mtp_config.changes_base else without_heads(model)

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`."""
        write_base(model, folder, always_index=False)
        write_config(model, folder)
        return ()

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`; N is 1."""
        causal_lm = load_plain(folder)
        change_weights(causal_lm, change)
        with torch.no_grad():
            logits_BTV: Tensor = causal_lm(tokens_BT, use_cache=False).logits
        return logits_BTV[:, :, None]


def without_heads(model: LazyModel) -> LazyModel:
    """The base alone."""
    notes = (f"heads left behind: {model.num_future_tokens - 1}",) if model.heads else ()
    return replace(model, mtp_config=PLAIN, heads={}, notes=model.notes + notes)


def read_plain(folder: Path, *, config: Any = None) -> LazyModel:
    """The plain checkpoint in a folder as a model with n = 1.

    Args:
        folder: a plain folder, the top of a headway folder, or weights alone.
        config: of the base, where the folder holds weights alone.

    Raises:
        CheckpointError, IncompatibleModelError: see `ModelFormat.read`.
    """
    config = read_config(folder) if config is None else config
    needed = architecture(config, PLAIN)
    base, left_out = match_base(open_checkpoint(folder), needed, str(folder))
    return LazyModel(
        config=config,
        mtp_config=PLAIN,
        base=base,
        heads={},
        base_name=base_name(folder),
        generation=read_generation(folder),
        left_out=left_out,
    )


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The generation settings of a folder, if it has any.

    Raises:
        CheckpointError: a damaged file.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); restore or delete it", path=path) from error


def write_generation(settings: Mapping[str, Any], folder: Path) -> None:
    """The inverse of `read_generation`."""
    (folder / GENERATION_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_name(folder: Path) -> str:
    """The hub name that older configurations carry, else the folder's last name."""
    path = folder / CONFIG_FILE
    original = json.loads(path.read_text(encoding="utf-8")).get("_name_or_path") if path.is_file() else None
    is_hub_name = isinstance(original, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", original) is not None
    return str(original) if is_hub_name else folder.resolve().name


def read_config(folder: Path) -> Any:
    """The Hugging Face configuration in a folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it is not a model folder or half written", path=path)
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers lets whatever a damaged file causes escape
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be read: {reason}; restore it", path=path) from error


def write_base(
    model: LazyModel, folder: Path, *, always_index: bool, written: Callable[[str, Tensor], None] | None = None
) -> None:
    """Write the base's weights as transformers would, under the names that it uses on disk.

    Args:
        model: the model; its heads are not written here.
        folder: where.
        always_index: write the index for a single file too.
        written: told each tensor's name in the base's state dict and its values, once it is on disk.
    """
    own_names = _own_names(model)

    def told(name: str, values: Tensor) -> None:
        if written is not None:
            written(own_names[name], values)

    on_disk = {name: model.base[own] for name, own in own_names.items()}
    write_checkpoint(folder, on_disk, always_index=always_index, written=told)


def base_writing_order(model: LazyModel) -> list[str]:
    """Names in the base's state dict in the order in which `write_base` writes them."""
    own_names = _own_names(model)
    return [own_names[name] for name in writing_order({name: model.base[own] for name, own in own_names.items()})]


def _own_names(model: LazyModel) -> dict[str, str]:
    needed = architecture(model.config, PLAIN)
    return {needed.on_disk(name): name for name in model.base}


def write_config(model: LazyModel, folder: Path) -> None:
    """Write config.json, the base's own with the dtype of the weights, and its generation settings."""
    if model.generation is not None:
        write_generation(model.generation, folder)
    config = copy.deepcopy(model.config)
    needed: Architecture = architecture(config, PLAIN)
    config.architectures = [needed.class_name]
    config.dtype = common_dtype(model.base)
    config.save_pretrained(folder)


def common_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The floating-point type of most bytes."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_bytes
    return max(counts, key=lambda dtype: counts[dtype])


def load_plain(folder: Path, *, config: Any = None) -> Any:
    """The causal LM in a folder, in float32 and in eval mode, with every weight from the folder.

    Args:
        folder: a plain folder, or the top of a headway folder.
        config: of the causal LM, where it is not the folder's own.

    Raises:
        CheckpointError: weights that the folder does not hold.
    """
    options = {} if config is None else {"config": config}
    causal_lm, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    lost = sorted(map(str, [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]))
    if lost:
        raise CheckpointError(
            f"the weights in {folder} do not fill the model: transformers would draw {len(lost)} tensors at random (first: "
            f"{lost[0]}); restore its files",
            path=folder,
        )
    return causal_lm.eval()


def change_weights(module: torch.nn.Module, change: WeightChange | None) -> None:
    """Change the parameters in place; buffers (rotary frequencies) stay as they are."""
    if change is not None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(change(parameter))
