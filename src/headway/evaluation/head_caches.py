"""Whether the keys and values that decoding keeps are those of one full forward over the text it wrote.

Equal text cannot show it: a head with a wrong cache only drafts worse.

Legend: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.loop import DecodingLoop
from headway.errors import DecodingError
from headway.evaluation.json_ready import json_ready
from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class CacheCheck:
    """Caches of base and heads after some blocks, beside one forward over the same text.

    Attributes:
        largest_difference: over all keys and values of all rows, at positions whose tokens are all known.
        largest_value: the largest of those keys and values, to compare it with.
        head_layers: cache layers of the heads among them; 0 for heads without attention.
        entries: keys and values compared.
        block_lengths: the different numbers of tokens that blocks emitted; with several, rows were ragged.
    """

    largest_difference: float
    largest_value: float
    head_layers: int
    entries: int
    block_lengths: tuple[int, ...]

    @property
    def relative(self) -> float:
        """The largest difference over the largest value."""
        return self.largest_difference / self.largest_value

    def to_json(self) -> dict[str, Any]:
        """All fields and the relative difference."""
        return cast(dict[str, Any], json_ready(self)) | {"relative": self.relative}


def check_head_caches(model: MultiTokenLM, prompts_BT: Tensor, *, blocks: int = 10) -> CacheCheck:
    """Decode some blocks and compare every kept key and value with a teacher-forced forward over the written text.

    Run it on a float64 copy of a model: the difference of a right cache is then that of the norms' own float32.

    Args:
        model: decoded with greedily, drafting with all heads.
        prompts_BT: prompts of equal length without padding; rows become ragged by what each accepts.
        blocks: forward passes, the prefill among them, at least 2.

    Raises:
        DecodingError: fewer than 2 blocks.
    """
    if blocks < 2:
        raise DecodingError(f"a check of caches needs at least 2 blocks (the first is the prefill): got {blocks}")
    drafts = model.num_future_tokens - 1
    room = (blocks + 1) * (drafts + 1)
    loop = ENGINE.start(
        model,
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=room,
        min_new_tokens=room,
        do_sample=False,
        num_draft_tokens=drafts,
    )
    with decoding_context(model):
        for _ in range(blocks):
            loop.step()
    difference, value, entries = 0.0, 0.0, 0
    for row, prompt_T in enumerate(prompts_BT):
        text_1T = torch.tensor([[*prompt_T.tolist(), *loop.new_tokens(row)]], device=prompts_BT.device)
        for found, wanted in _cache_pairs(model, loop, row, text_1T, drafts=drafts):
            difference = max(difference, float((found - wanted).abs().max()))
            value = max(value, float(wanted.abs().max()))
            entries += wanted.numel()
    return CacheCheck(
        largest_difference=difference,
        largest_value=value,
        head_layers=model.heads.cache_layers(drafts),
        entries=entries,
        block_lengths=tuple(sorted({len(forward.tokens) for row in loop.rows for forward in row[1:]})),
    )


def _cache_pairs(
    model: MultiTokenLM, loop: DecodingLoop, row: int, text_1T: Tensor, *, drafts: int
) -> list[tuple[Tensor, Tensor]]:
    """(kept, computed at once) keys and values of one row, layer by layer, where all tokens that they need are known."""
    known = text_1T.shape[1]
    windows = attention_windows(model.config, num_heads=model.heads.cache_layers(drafts))
    whole = RaggedCache([None] * len(windows), batch=1, capacity=known, device=text_1T.device)
    whole.begin_aligned(0, known)
    with torch.no_grad():
        model.offset_hidden_states(text_1T, past_key_values=whole, use_cache=True, num_offsets=1 + drafts)
    pairs = []
    for index, (kept, computed) in enumerate(zip(loop.executor.cache.layers, whole.layers, strict=True)):
        # The last token has not been fed yet; a head that reads the text behind a position lags by its depth.
        depth = index - len(model.family.layers) + 1
        final = known - (depth if model.heads.reads_tokens and depth >= 1 else 1)
        for found, wanted in ((kept.keys, computed.keys), (kept.values, computed.values)):
            pairs.append((found[row, :, :final], wanted[0, :, :final]))
    return pairs
