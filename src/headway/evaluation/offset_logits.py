"""Logits of every offset in small pieces, so that an evaluation never holds [B, T, N, V].

Legend: B batch, T positions, D width, V vocabulary, N future tokens, P positions of one chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.errors import ConfigError
from headway.model.documents import isolating_mask, positions_from_documents
from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class OffsetChunk:
    """Logits of one offset at some positions.

    Attributes:
        offset: how many tokens ahead, from 1.
        positions: the chunk's place in the flattened batch (row-major B*T).
        logits_PV: float32, or float64 where the model is float64.
    """

    offset: int
    positions: slice
    logits_PV: Tensor


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without a trace: eval mode and no gradients inside, every module's own mode back afterwards.

    A frozen sub-module that was in eval mode before stays so, and the mode comes back after an error too. Layers
    compiled with `torch.compile` run eagerly inside: an evaluation's shapes would each be compiled anew.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for module, training in modes:
            module.training = training


def offset_logit_chunks(
    model: MultiTokenLM,
    input_ids_BT: Tensor,
    *,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    num_offsets: int | None = None,
    chunk_tokens: int = 1024,
) -> Iterator[OffsetChunk]:
    """Yield the logits of offsets 1..num_offsets, `chunk_tokens` positions at a time.

    Equal to slices of `model(..., return_future_logits=True).future_logits`; peak logits are [chunk_tokens,
    V]. Attention does not cross documents (position ids that restart, document ids that change), as in
    training. Heads that draft in turn are told the text's own tokens; where a document has none, logits are NaN.

    Args:
        model: any multi-token model; call it inside `evaluation_mode`.
        input_ids_BT: tokens without padding.
        position_ids_BT: positions within each document.
        document_ids_BT: any integers that differ between neighbouring documents.
        num_offsets: how many offsets, from 1; all of the model's by default.
        chunk_tokens: positions per chunk.

    Raises:
        ConfigError: chunk_tokens < 1, or num_offsets outside 1..num_future_tokens.
    """
    wanted = model.num_future_tokens if num_offsets is None else num_offsets
    if not 1 <= wanted <= model.num_future_tokens:
        raise ConfigError(f"num_offsets must lie in 1..{model.num_future_tokens} (the model's): got {num_offsets}")
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1: got {chunk_tokens}; 1024 is the default")
    if position_ids_BT is None and document_ids_BT is not None:
        position_ids_BT = positions_from_documents(document_ids_BT)
    hidden = model.offset_hidden_states(
        input_ids_BT,
        attention_mask=isolating_mask(
            model.config,
            shape=(input_ids_BT.shape[0], input_ids_BT.shape[1]),
            dtype=model.dtype,
            device=input_ids_BT.device,
            attention_mask_BT=None,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
        ),
        position_ids=position_ids_BT,
        document_ids=document_ids_BT,
        use_cache=False,
        num_offsets=wanted,
    )
    for offset, (source_BTD, previous_BT) in enumerate(zip(hidden.hidden, hidden.previous, strict=True), start=1):
        flat_PD = source_BTD.reshape(-1, source_BTD.shape[-1])
        previous_P = None if previous_BT is None else previous_BT.flatten()
        for start in range(0, flat_PD.shape[0], chunk_tokens):
            positions = slice(start, min(start + chunk_tokens, flat_PD.shape[0]))
            logits_PV = model.offset_logits(
                flat_PD[positions], offset=offset, previous=None if previous_P is None else previous_P[positions]
            )
            yield OffsetChunk(offset, positions, logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float())
