"""Whether the keys and values that decoding keeps are those of one full forward over the same text.

Equal text cannot show it: a head with a wrong cache only drafts worse. And text that a model writes by itself may not show
it either: where a small model loops, every draft is accepted and nothing that a rejected draft left behind is ever read. So the
decoder is made to follow a given text, whose turns its drafts do not foresee.

Legend: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

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


class _FollowText(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding choose the next token of the text that begins as what has been written does."""

    def __init__(self, texts_BT: Tensor, prompt_tokens: int) -> None:
        self._texts = {tuple(text[:prompt_tokens]): text for text in texts_BT.tolist()}
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave nothing but the text's token possible."""
        forced = torch.full_like(scores, -torch.inf)
        for row, written in enumerate(input_ids.tolist()):
            forced[row, self._texts[tuple(written[: self._prompt_tokens])][len(written)]] = 0.0
        return forced


def check_head_caches(model: MultiTokenLM, texts_BT: Tensor, *, prompt_tokens: int, blocks: int = 10) -> CacheCheck:
    """Decode along given texts for some blocks and compare every kept key and value with a teacher-forced forward.

    The decoder drafts with all heads and accepts what the text goes on with, so that rows advance unevenly and most drafts
    are rejected. Run it on a float64 copy of a model: the difference of a right cache is then that of the norms' own
    float32.

    Args:
        model: decoded with.
        texts_BT: texts without padding, all different from the beginning on.
        prompt_tokens: how many tokens of each are the prompt.
        blocks: forward passes, the prefill among them, at least 2.

    Raises:
        DecodingError: fewer than 2 blocks, texts too short for them, or two texts with the same prompt.
    """
    drafts = model.num_future_tokens - 1
    room = (blocks + 1) * (drafts + 1)
    length = texts_BT.shape[1]
    if blocks < 2 or prompt_tokens < 1 or length < prompt_tokens + room:
        raise DecodingError(
            f"a check of caches needs at least 2 blocks (the first is the prefill) and texts of prompt_tokens + {room} "
            f"tokens for {blocks} blocks: got texts of {length} tokens, prompt_tokens={prompt_tokens}"
        )
    prompts_BT = texts_BT[:, :prompt_tokens]
    if len(set(map(tuple, prompts_BT.tolist()))) < prompts_BT.shape[0]:
        raise DecodingError("two texts begin with the same prompt, and rows are told apart by it; pass longer prompts")
    loop = ENGINE.start(
        model,
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=room,
        do_sample=False,
        num_draft_tokens=drafts,
        logits_processor=LogitsProcessorList([_FollowText(texts_BT, prompt_tokens)]),
        eos_token_id=-1,
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
