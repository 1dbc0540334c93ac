"""Loading a written folder again and holding it to its source, before it is kept.

Legend: B batch, T positions, N future tokens, V vocabulary.

Two independent looks: every tensor is read back and compared bit for bit with what was to be written, and the logits of
every offset are computed from both folders, each by its own format's reading of its weights, in float32.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from headway.convert.architecture import PLAIN, architecture, unlike_the_paper
from headway.convert.future_tokens import last_layer
from headway.convert.lazy_model import LazyModel, LazyTensor, ModelFormat, filled
from headway.convert.report import Verification
from headway.errors import CheckpointError

BATCH, POSITIONS = 2, 24
TIMES_NOISE = 16
"""Differences up to so many times the model's own float32 noise pass."""

_ROUNDING = 2.0**-23
_ZERO_AT_FIRST = re.compile(r"\.inner\.weight$")  # residual SiLU blocks; a bias of zero may be one that is not there
_SEED = 0


def verify(
    model: LazyModel,
    *,
    source: Path,
    source_format: ModelFormat,
    base: Path | None,
    written: Path,
    target_format: ModelFormat,
    dtype: torch.dtype | None,
) -> Verification:
    """Compare a written folder with its source.

    Args:
        model: what was to be written.
        source: folder that it came from.
        source_format: how to read it.
        base: folder of the base where the source holds heads alone.
        written: the folder to check.
        target_format: how to read that.
        dtype: to which the weights were rounded, if any: the source's are rounded alike before logits are compared.

    Raises:
        CheckpointError: tensors or logits that differ; names them.
    """
    # A layout of heads alone is read with the base that the source has: its folder is one, at its top.
    base_of_written = None if target_format.holds_base else (source if base is None else base)
    compared = _compare_tensors(model, target_format.read(written, base=base_of_written))
    generator = torch.Generator().manual_seed(_SEED)
    positions = min(POSITIONS, int(model.config.max_position_embeddings))
    tokens_BT = torch.randint(0, int(model.config.vocab_size), (BATCH, positions), generator=generator)

    def rounded(weight: Tensor) -> Tensor:
        return weight if dtype is None else weight.to(dtype).float()

    def disturbed(weight: Tensor) -> Tensor:
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        return rounded(weight) * (1 + _ROUNDING * signs)

    source_BTNV = source_format.logits(source, tokens_BT, base=base, change=rounded)
    scale = float(source_BTNV.nan_to_num().abs().max())
    noise = _gap(source_format.logits(source, tokens_BT, base=base, change=disturbed), source_BTNV)
    limit = TIMES_NOISE * max(noise, _ROUNDING * scale)
    written_BTNV = target_format.logits(
        written, tokens_BT, base=base_of_written, change=None if target_format.holds_base else rounded
    )
    differences = _differences(model, source_BTNV, written_BTNV)
    for offset, difference in enumerate(differences, start=1):
        if difference is not None and not difference <= limit:
            raise CheckpointError(
                f"the converted model differs from its source: logits of offset {offset} by {difference:.3g} (limit "
                f"{limit:.3g}); nothing was kept: this is a mistake of the conversion, please report it"
            )
    return Verification(
        max_abs_difference=differences,
        max_abs_logit=scale,
        limit=limit,
        num_tokens=tokens_BT.numel(),
        tensors_compared=compared,
        missing=(),
        random=tuple(sorted(name for name, tensor in model.heads.items() if tensor.origin == "fresh")),
        unchanged=_untrained(model),
    )


def _compare_tensors(model: LazyModel, again: LazyModel) -> int:
    pairs: list[tuple[str, LazyTensor, LazyTensor | None]] = [
        (name, tensor, again.base.get(name)) for name, tensor in model.base.items()
    ]
    pairs += [(f"heads.{name}", tensor, again.heads.get(name)) for name, tensor in model.heads.items()]
    missing = [name for name, _, found in pairs if found is None]
    changed = [name for name, wanted, found in pairs if found is not None and not _same_values(wanted, found)]
    if missing or changed:
        raise CheckpointError(
            f"the written folder does not hold what was to be written: {len(missing)} tensors missing, {len(changed)} "
            f"changed (first: {(missing + changed)[0]}); nothing was kept: check the disk and convert again"
        )
    return len(pairs)


def _same_values(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = one.read().contiguous().reshape(-1), other.read().contiguous().reshape(-1)
    # As bytes: NaN equals itself, and -0.0 is not 0.0.
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def _gap(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where only one of them is NaN (heads that need tokens which do not exist)."""
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    return float((one.nan_to_num() - other.nan_to_num()).abs().max())


def _differences(model: LazyModel, source_BTNV: Tensor, written_BTNV: Tensor) -> tuple[float | None, ...]:
    differences: list[float | None] = []
    for index in range(written_BTNV.shape[2]):
        if index < source_BTNV.shape[2]:
            expected_BTV = source_BTNV[:, :, index]
        elif _speaks_like_offset_1(model, index - 1):
            expected_BTV = source_BTNV[:, :, 0]
        else:
            differences.append(None)
            continue
        differences.append(_gap(expected_BTV, written_BTNV[:, :, index]))
    return tuple(differences)


def _speaks_like_offset_1(model: LazyModel, head: int) -> bool:
    """Whether an added head says what the next-token head says: it reads and computes the same until it is trained."""
    config = model.mtp_config
    if config.heads == "transformer" and unlike_the_paper(config):
        return False
    if config.heads not in ("transformer", "linear", "medusa", "replicated_unembedding"):
        return False
    if config.tap_back or config.markov_rank:
        return False
    own = (f"{head}.", f"unembeddings.{head}.")
    return all(tensor.origin == "copy" for name, tensor in model.heads.items() if name.startswith(own))


def _untrained(model: LazyModel) -> tuple[str, ...]:
    """Tensors of heads that equal what a head may have started as: the base's last layer or output matrix, zero."""
    needed = architecture(model.config, PLAIN)
    layer = last_layer(model.whole_base, needed)
    output = model.whole_base.get("lm_head.weight") or model.whole_base.get(needed.tied.get("lm_head.weight", ""))
    equal = []
    for name, tensor in sorted(model.heads.items()):
        inside = re.sub(r"^\d+\.(?:\d+\.|layer\.)?", "", name)
        twin = output if name.startswith("unembeddings.") else layer.get(inside)
        if _ZERO_AT_FIRST.search(name):
            twin = filled(0.0, tensor.shape, tensor.dtype)
        if twin is not None and _same_values(tensor, twin.to(tensor.dtype)):
            equal.append(name)
    return tuple(equal)
