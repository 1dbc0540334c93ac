"""Format `medusa`: heads in one file beside a config.json that names their base.

Without an output matrix of their own (Medusa-2 checkpoints) the heads use the base's.
"""

from __future__ import annotations

import json
from pathlib import Path

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
)
from headway.convert.medusa.tensors import sort_tensors
from headway.convert.safetensors_files import open_safetensors
from headway.convert.sidecar import SIDECAR_FILE, write_sidecar
from headway.convert.torch_files import open_torch_file, write_torch_file
from headway.errors import CheckpointError

TORCH_FILE = "medusa_lm_head.pt"
SAFETENSORS_FILE = "medusa_lm_head.safetensors"


class MedusaFolder:
    """See the module."""

    name = "medusa"
    marker = CONFIG_FILE
    files = (CONFIG_FILE, TORCH_FILE, SAFETENSORS_FILE, SIDECAR_FILE)
    holds_heads = True
    holds_base = False
    is_hugging_face = False

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`."""
        return named_base(folder)

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`."""
        values = read_json(folder)
        found = _open(folder)
        tensors = sort_tensors(found, str(folder))
        path = folder / CONFIG_FILE
        notes = count(values, "medusa_num_heads", tensors.num_heads, path)
        notes += count(values, "medusa_num_layers", tensors.num_blocks, path)
        if tensors.unembeddings and tensors.unembeddings.keys() != set(range(tensors.num_heads)):
            raise CheckpointError(
                f"{folder} has output matrices for heads {', '.join(map(str, sorted(tensors.unembeddings)))} of "
                f"{tensors.num_heads}; all heads need one, or none; restore it",
                path=folder,
            )
        return read_heads(folder, base, tensors, shared=not tensors.unembeddings, notes=notes)

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: Medusa heads."""
        return heads_alone(model, self.name)

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`; a torch.save file, since Medusa's own code reads no other."""
        blocks = model.mtp_config.blocks_per_head
        write_torch_file(folder / TORCH_FILE, {_name(name, blocks): tensor for name, tensor in model.heads.items()})
        write_sidecar(model, folder)
        values = {
            BASE_KEY: model.base_name,
            "medusa_num_heads": model.num_future_tokens - 1,
            "medusa_num_layers": blocks,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return (
            f"{TORCH_FILE} is a torch.save file, as Medusa's own code reads it; --to medusa-engine writes safetensors",
        )

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`."""
        assert base is not None
        return medusa_logits(base, sort_tensors(_open(folder), str(folder)), tokens_BT, change=change)


def _name(name: str, blocks: int) -> str:
    """FasterDecoding's name of a tensor of the heads.

    >>> _name("2.0.inner.weight", 1), _name("unembeddings.2.weight", 1)
    ('2.0.linear.weight', '2.1.weight')
    """
    if name.startswith("unembeddings."):
        return f"{name.split('.')[1]}.{blocks}.weight"
    return name.replace(".inner.", ".linear.")


def _open(folder: Path) -> dict[str, LazyTensor]:
    if (folder / SAFETENSORS_FILE).is_file():
        return open_safetensors(folder / SAFETENSORS_FILE)
    if (folder / TORCH_FILE).is_file():
        return open_torch_file(folder / TORCH_FILE)
    raise CheckpointError(
        f"{folder} has neither {SAFETENSORS_FILE} nor {TORCH_FILE}: it is no folder of Medusa heads, or half written",
        path=folder,
    )
