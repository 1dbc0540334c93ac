"""Likelihood and accuracy of every offset on held-out text.

Legend: B batch, T positions, D width, V vocabulary, N future tokens, P positions of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

from headway.data.loader import Batch
from headway.errors import ConfigError, DataError
from headway.evaluation.json_ready import json_ready
from headway.evaluation.offset_logits import evaluation_mode, offset_logit_chunks
from headway.functional.targets import IGNORE_INDEX, shift_targets
from headway.model.multi_token_lm import MultiTokenLM
from headway.processes import Processes


@dataclass(frozen=True)
class OffsetLikelihood:
    """Held-out likelihood per offset; item k-1 belongs to offset k.

    Attributes:
        nats: mean negative log-likelihood in nats over the offset's valid targets; NaN where it has none.
        accuracy: share of valid targets that are the argmax; NaN where there is none.
        bits_per_byte: nats / ln 2 / bytes per token, or None where bytes per token were not given.
        num_targets: valid targets counted.
    """

    nats: tuple[float, ...]
    accuracy: tuple[float, ...]
    bits_per_byte: tuple[float, ...] | None
    num_targets: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields; NaN becomes None."""
        return cast(dict[str, Any], json_ready(self))


def evaluate_likelihood(
    model: MultiTokenLM,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float | None = None,
    chunk_tokens: int = 1024,
    processes: Processes | None = None,
) -> OffsetLikelihood:
    """Mean nats and accuracy per offset over all valid targets of all batches.

    Equal to computing `log_softmax(future_logits)` whole and averaging over the targets of `shift_targets`;
    only `[chunk_tokens, V]` logits of one offset exist at a time. The mean runs over targets, not over
    batches. The model's train/eval modes, its gradients and the random state are as before the call.

    Args:
        model: evaluated in eval mode on the device of the batches.
        batches: packed or plain batches without padding.
        bytes_per_token: mean bytes of one held-out token (1.0 for byte tokens).
        chunk_tokens: positions whose logits exist at once.
        processes: each passes other batches, or none, and all get the figures of all batches; None: this one alone.

    Raises:
        DataError: there was no batch.
        ConfigError: bytes_per_token or chunk_tokens that is not positive.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), equation 2, per offset.
    """
    if bytes_per_token is not None and not bytes_per_token > 0:
        raise ConfigError(f"bytes_per_token must be positive: got {bytes_per_token}; pass total bytes / total tokens")
    num_offsets = model.num_future_tokens
    sums = [_Sums() for _ in range(num_offsets)]
    with evaluation_mode(model):
        for batch in batches:
            _add_batch(model, batch, sums, chunk_tokens=chunk_tokens)
    if processes is not None:
        device = next(model.parameters()).device
        rows = [[total.nats, total.correct, total.targets, total.batches] for total in sums]
        totals_N4 = processes.total(torch.tensor(rows, dtype=torch.float64, device=device)).tolist()
        sums = [_Sums(nats, int(correct), int(targets), int(count)) for nats, correct, targets, count in totals_N4]
    if not sums[0].batches:
        raise DataError("nothing to evaluate: there was no batch; pass at least one batch of tokens")
    nats = tuple(total.nats / total.targets if total.targets else math.nan for total in sums)
    return OffsetLikelihood(
        nats=nats,
        accuracy=tuple(total.correct / total.targets if total.targets else math.nan for total in sums),
        bits_per_byte=None
        if bytes_per_token is None
        else tuple(value / math.log(2) / bytes_per_token for value in nats),
        num_targets=tuple(total.targets for total in sums),
    )


@dataclass
class _Sums:
    nats: float = 0.0
    correct: int = 0
    targets: int = 0
    batches: int = 0


def _add_batch(model: MultiTokenLM, batch: Batch, sums: list[_Sums], *, chunk_tokens: int) -> None:
    targets_per_offset = [
        shift_targets(
            batch.labels_BT,
            offset=offset,
            position_ids_BT=batch.position_ids_BT,
            document_ids_BT=batch.document_ids_BT,
        ).flatten()
        for offset in range(1, len(sums) + 1)
    ]
    for total in sums:
        total.batches += 1
    for chunk in offset_logit_chunks(
        model,
        batch.input_ids_BT,
        position_ids_BT=batch.position_ids_BT,
        document_ids_BT=batch.document_ids_BT,
        chunk_tokens=chunk_tokens,
    ):
        targets_P = targets_per_offset[chunk.offset - 1][chunk.positions]
        valid_P = targets_P != IGNORE_INDEX
        logits_PV, targets_P = chunk.logits_PV[valid_P], targets_P[valid_P]
        nll_P = torch.nn.functional.cross_entropy(logits_PV, targets_P, reduction="none")
        total = sums[chunk.offset - 1]
        total.nats += float(nll_P.double().sum())
        total.correct += int((logits_PV.argmax(-1) == targets_P).sum())
        total.targets += int(targets_P.numel())
