"""Acceptance along real text: how many tokens a forward would emit if the text were the held-out one.

Generated text of a small model loops, and loops are easy to draft for. Here the drafts are checked along
text that the model did not write, so the figure cannot be flattered: "loop-free" acceptance.

Legend: B batch, T positions, N future tokens (here: the offsets that are used, 1 + num_draft_tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from headway.errors import ConfigError, DataError
from headway.evaluation.json_ready import json_ready
from headway.evaluation.offset_logits import evaluation_mode, offset_logit_chunks
from headway.functional.targets import IGNORE_INDEX, shift_targets
from headway.model.multi_token_lm import MultiTokenLM
from headway.processes import Processes


@dataclass(frozen=True)
class WalkAcceptance:
    """Acceptance of the drafts along real text; item k-2 of a per-offset field belongs to offset k.

    Attributes:
        mean_acceptance_length: tokens emitted per block, the token of offset 1 included: 1 .. 1 +
            num_draft_tokens; NaN where no block fitted.
        acceptance_rate: share of accepted drafts among those whose earlier offsets were all accepted; NaN
            where an offset was never drafted.
        drafted: drafts that were checked (all earlier offsets accepted).
        accepted: drafts that were accepted.
        blocks: blocks walked.
        emitted_tokens: tokens the blocks emitted.
        num_draft_tokens: draft tokens per block.
        length_counts: how many blocks emitted 1, 2, ... tokens.
    """

    mean_acceptance_length: float
    acceptance_rate: tuple[float, ...]
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    blocks: int
    emitted_tokens: int
    num_draft_tokens: int
    length_counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields; NaN becomes None."""
        return cast(dict[str, Any], json_ready(self))


def walk_acceptance(
    model: MultiTokenLM,
    windows_BT: Tensor,
    *,
    num_draft_tokens: int | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    rows_per_forward: int = 32,
    processes: Processes | None = None,
) -> WalkAcceptance:
    """Walk windows of real text block by block and count the drafts that would be accepted.

    A block at position t drafts, for each offset k = 2 .. 1 + num_draft_tokens, the argmax of offset k at
    t. Draft k is accepted where it equals the argmax of offset 1 at t + k - 1, which has read the real text
    up to there (teacher forcing), and all earlier drafts were accepted. With a accepted drafts the block
    emits 1 + a tokens and the next block stands at t + 1 + a.

    A block counts only if every token that it predicts, t + 1 .. t + 1 + num_draft_tokens, lies in the same
    window and the same document. Where one does not, the rest of the document is passed over uncounted and
    the walk goes on at the next document's first token. Whether a block is cut depends on its place alone,
    never on its outcome, so the mean has no bias from it.

    A model that has learned nothing and predicts one token everywhere agrees with itself: read the figure beside the
    accuracy.

    Args:
        model: evaluated in eval mode; modes, gradients and the random state are as before the call.
        windows_BT: held-out token ids without padding.
        num_draft_tokens: drafts per block, 0 .. n - 1; all by default.
        position_ids_BT: positions within each document, where windows hold several.
        document_ids_BT: integers that differ between neighbouring documents.
        rows_per_forward: windows per forward pass.
        processes: all pass the same windows, each walks its share of them, and all get the figures of all; None: this one
            alone.

    Raises:
        ConfigError: num_draft_tokens outside 0 .. n - 1, or rows_per_forward < 1.
        DataError: windows that are not [B, T] or hold no token.

    Source: the rule is greedy blockwise parallel decoding (Stern et al. 2018, arXiv:1811.03115, section 3),
    with the real text in the place of the generated one.
    """
    largest = model.num_future_tokens - 1
    drafts = largest if num_draft_tokens is None else num_draft_tokens
    if not 0 <= drafts <= largest:
        raise ConfigError(f"num_draft_tokens must lie in 0..{largest} (the model's heads): got {num_draft_tokens}")
    if rows_per_forward < 1:
        raise ConfigError(f"rows_per_forward must be at least 1: got {rows_per_forward}")
    if windows_BT.ndim != 2 or windows_BT.numel() == 0:
        raise DataError(f"windows must have the shape [batch, positions] with tokens: got {tuple(windows_BT.shape)}")
    if processes is not None and processes.several:
        return _together(
            model,
            windows_BT,
            processes,
            num_draft_tokens=drafts,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            rows_per_forward=rows_per_forward,
        )
    lengths: list[int] = []
    with evaluation_mode(model):
        for start in range(0, windows_BT.shape[0], rows_per_forward):
            rows = slice(start, start + rows_per_forward)
            ids_BT = windows_BT[rows]
            positions_BT = None if position_ids_BT is None else position_ids_BT.expand_as(windows_BT)[rows]
            documents_BT = None if document_ids_BT is None else document_ids_BT.expand_as(windows_BT)[rows]
            fits_BT = (
                shift_targets(ids_BT, offset=1 + drafts, position_ids_BT=positions_BT, document_ids_BT=documents_BT)
                != IGNORE_INDEX
            )
            predicted_BTN = _argmax_per_offset(
                model,
                ids_BT,
                position_ids_BT=positions_BT,
                document_ids_BT=documents_BT,
                num_offsets=1 + drafts,
            )
            lengths += walk_blocks(predicted_BTN, fits_BT)
    return summarize_blocks(lengths, num_draft_tokens=drafts, num_future_tokens=model.num_future_tokens)


def _together(
    model: MultiTokenLM,
    windows_BT: Tensor,
    processes: Processes,
    *,
    num_draft_tokens: int,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    rows_per_forward: int,
) -> WalkAcceptance:
    mine = list(processes.share_of(windows_BT.shape[0]))
    counts = torch.zeros(1 + num_draft_tokens, dtype=torch.long, device=windows_BT.device)
    if mine:
        own = walk_acceptance(
            model,
            windows_BT[mine],
            num_draft_tokens=num_draft_tokens,
            position_ids_BT=None if position_ids_BT is None else position_ids_BT.expand_as(windows_BT)[mine],
            document_ids_BT=None if document_ids_BT is None else document_ids_BT.expand_as(windows_BT)[mine],
            rows_per_forward=rows_per_forward,
        )
        counts += torch.tensor(own.length_counts, device=counts.device)
    lengths = [
        length for length, count in enumerate(processes.total(counts).tolist(), start=1) for _ in range(int(count))
    ]
    return summarize_blocks(lengths, num_draft_tokens=num_draft_tokens, num_future_tokens=model.num_future_tokens)


def walk_blocks(predicted_BTN: Tensor, fits_BT: Tensor) -> list[int]:
    """Tokens emitted by each block of the walk, row after row.

    >>> argmaxes = torch.tensor([[[5, 6], [6, 0], [7, 0], [8, 0]]])  # 6 is drafted at t=0, agreed at t=1
    >>> walk_blocks(argmaxes, torch.tensor([[True, True, True, False]]))
    [2, 1]

    Args:
        predicted_BTN: argmax of each offset at each position; item 0 of the last dimension is offset 1.
        fits_BT: whether a block may start at the position (all its predictions are of one document and
            window).

    Returns:
        For every counted block 1 + its accepted drafts.
    """
    _, length, num_offsets = predicted_BTN.shape
    accepted_BT = torch.zeros_like(fits_BT, dtype=torch.long)
    running_BT = fits_BT.clone()
    for offset in range(2, num_offsets + 1):
        ahead = offset - 1
        agrees_BT = torch.zeros_like(running_BT)
        keep = max(0, length - ahead)
        agrees_BT[:, :keep] = predicted_BTN[:, :keep, offset - 1] == predicted_BTN[:, ahead:, 0]
        running_BT &= agrees_BT
        accepted_BT += running_BT
    lengths = []
    for fits, accepted in zip(fits_BT.tolist(), accepted_BT.tolist(), strict=True):
        position = 0
        while position < length:
            if not fits[position]:
                position += 1
                continue
            lengths.append(1 + accepted[position])
            position += lengths[-1]
    return lengths


def summarize_blocks(
    lengths: Sequence[int], *, num_draft_tokens: int, num_future_tokens: int | None = None
) -> WalkAcceptance:
    """Statistics of blocks that all drafted `num_draft_tokens` tokens and emitted `lengths` tokens each.

    >>> summarize_blocks([1, 3, 2, 3], num_draft_tokens=2).acceptance_rate
    (0.75, 0.6666666666666666)

    Args:
        lengths: tokens emitted per block, 1 .. 1 + num_draft_tokens.
        num_draft_tokens: drafts per block.
        num_future_tokens: n, the length of the per-offset fields plus one; 1 + num_draft_tokens by default.
    """
    offsets = num_draft_tokens if num_future_tokens is None else num_future_tokens - 1
    accepted = tuple(sum(length > index for length in lengths) for index in range(1, offsets + 1))
    drafted = tuple(
        (len(lengths) if index == 0 else accepted[index - 1]) if index < num_draft_tokens else 0
        for index in range(offsets)
    )
    return WalkAcceptance(
        mean_acceptance_length=sum(lengths) / len(lengths) if lengths else math.nan,
        acceptance_rate=tuple(a / d if d else math.nan for a, d in zip(accepted, drafted, strict=True)),
        drafted=drafted,
        accepted=accepted,
        blocks=len(lengths),
        emitted_tokens=sum(lengths),
        num_draft_tokens=num_draft_tokens,
        length_counts=tuple(sum(length == count for length in lengths) for count in range(1, num_draft_tokens + 2)),
    )


def _argmax_per_offset(
    model: MultiTokenLM,
    ids_BT: Tensor,
    *,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    num_offsets: int,
) -> Tensor:
    flat_PN = torch.empty((ids_BT.numel(), num_offsets), dtype=torch.long, device=ids_BT.device)
    for chunk in offset_logit_chunks(
        model,
        ids_BT,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
        num_offsets=num_offsets,
    ):
        flat_PN[chunk.positions, chunk.offset - 1] = chunk.logits_PV.argmax(-1)
    return flat_PN.view(*ids_BT.shape, num_offsets)
