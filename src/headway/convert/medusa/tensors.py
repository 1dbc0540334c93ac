"""Tensors of Medusa heads by whoever wrote them, and those of `headway.heads.medusa` that they are.

Legend: i head (offset i + 2), j block, m blocks per head, D width, V vocabulary.

FasterDecoding: `{i}.{j}.linear.weight|bias`, and `{i}.{m}.weight` for a head's own output matrix; trainers put
`medusa_head.` in front. Engines: `blocks.{i}.layers.{j}.weight|bias` and `lm_heads.{i}.weight`, or FasterDecoding's names.

Sources: Cai et al. 2024 (arXiv:2401.10774) and its code; vLLM 0.32, model_executor/models/medusa.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from headway.convert.lazy_model import LazyTensor, filled
from headway.errors import CheckpointError

_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)|blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_UNEMBEDDING = re.compile(r"(\d+)\.(\d+)\.weight|lm_heads\.(\d+)\.weight")

TOKEN_MAP = "token_map"


@dataclass(frozen=True)
class MedusaTensors:
    """Medusa heads, sorted.

    Attributes:
        blocks: (head, block, "weight" or "bias") -> tensor.
        unembeddings: head -> its output matrix [V, D].
        num_heads: n - 1.
        num_blocks: m.
    """

    blocks: Mapping[tuple[int, int, str], LazyTensor]
    unembeddings: Mapping[int, LazyTensor]
    num_heads: int
    num_blocks: int

    @property
    def without_bias(self) -> bool:
        """Whether no block has a bias."""
        return not any(what == "bias" for _, _, what in self.blocks)

    def to_heads(self) -> dict[str, LazyTensor]:
        """The state dict of the heads without their unembeddings; a bias that is not there is zero."""
        heads = {f"{head}.{block}.inner.{what}": tensor for (head, block, what), tensor in self.blocks.items()}
        for (head, block, what), weight in self.blocks.items():
            if what == "weight":
                heads.setdefault(f"{head}.{block}.inner.bias", filled(0.0, weight.shape[:1], weight.dtype))
        return heads


def sort_tensors(found: Mapping[str, LazyTensor], where: str) -> MedusaTensors:
    """Sort the tensors of a file of Medusa heads.

    Raises:
        CheckpointError: tensors that are no Medusa head's, heads without a gap in their numbers missing, heads of
            different depth; names them.
    """
    blocks: dict[tuple[int, int, str], LazyTensor] = {}
    unembeddings: dict[int, LazyTensor] = {}
    depth_of_unembedding: dict[int, int] = {}
    unknown: list[str] = []
    for name, tensor in found.items():
        inside = _PREFIX.sub("", name)
        block, unembedding = _BLOCK.fullmatch(inside), _UNEMBEDDING.fullmatch(inside)
        if block is not None:
            head, number, what = (part for part in block.groups() if part is not None)
            blocks[int(head), int(number), what] = tensor
        elif unembedding is not None:
            parts = [int(part) for part in unembedding.groups() if part is not None]
            unembeddings[parts[0]] = tensor
            if len(parts) == 2:
                depth_of_unembedding[parts[0]] = parts[1]
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that are no Medusa head's: {', '.join(sorted(unknown)[:8])}; nothing was "
            f"converted",
            path=where,
        )
    if not blocks:
        raise CheckpointError(f"{where} holds no Medusa head (no residual block); nothing was converted", path=where)
    num_heads = 1 + max(head for head, _, _ in blocks)
    num_blocks = 1 + max(block for _, block, _ in blocks)
    with_bias = any(what == "bias" for _, _, what in blocks)
    expected = {
        (head, block, what)
        for head in range(num_heads)
        for block in range(num_blocks)
        for what in (("weight", "bias") if with_bias else ("weight",))
    }
    missing = [f"head {head} block {block} {what}" for head, block, what in sorted(expected - blocks.keys())]
    odd = [head for head, depth in depth_of_unembedding.items() if depth != num_blocks]
    if missing or odd:
        lacks = missing[0] if missing else f"head {odd[0]}: its output matrix does not follow block {num_blocks - 1}"
        raise CheckpointError(
            f"{where} does not hold {num_heads} whole heads of {num_blocks} blocks: {len(missing) + len(odd)} faults "
            f"(first: {lacks}); restore it",
            path=where,
        )
    return MedusaTensors(blocks, unembeddings, num_heads, num_blocks)
