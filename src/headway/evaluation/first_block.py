"""Acceptance of the first block after held-out text, by the real decoder.

Another loop-free figure beside the walk (`headway.evaluation.acceptance`). The walk tells every head the real text: where
the text is not what the model would have written, a head that reads the tokens between a position and its offset is told
so, one that does not is not. Here the decoder continues real text by itself, so heads of both kinds are in the position
that they are in when they are used, and a text of one block is too short to loop.

Legend: B prompts, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Registers the engine that `MultiTokenLM.generate` delegates to.
import headway.decoding.engine  # noqa: F401
from headway.errors import ConfigError, DataError
from headway.evaluation.acceptance import WalkAcceptance, summarize_blocks
from headway.evaluation.offset_logits import evaluation_mode
from headway.model.multi_token_lm import MultiTokenLM


def first_block_acceptance(model: MultiTokenLM, prompts_BT: Tensor, *, rows_per_forward: int = 128) -> WalkAcceptance:
    """Continue every prompt greedily and count what the first forward pass with a draft emits.

    The prefill gives each prompt one token and the first draft; the block after it emits 1 to n tokens. A row whose text
    ended with the prefill's token counts for nothing.

    Args:
        model: decoded with, drafting with all heads.
        prompts_BT: held-out token ids without padding, as many as the figure is to be sharp.
        rows_per_forward: prompts decoded together.

    Returns:
        One block per prompt; `mean_acceptance_length` is tokens per forward.

    Raises:
        DataError: prompts that are not [B, T] or hold no token.
        ConfigError: rows_per_forward < 1.
    """
    if prompts_BT.ndim != 2 or prompts_BT.numel() == 0:
        raise DataError(f"prompts must have the shape [prompts, tokens] with tokens: got {tuple(prompts_BT.shape)}")
    if rows_per_forward < 1:
        raise ConfigError(f"rows_per_forward must be at least 1: got {rows_per_forward}")
    lengths: list[int] = []
    with evaluation_mode(model):
        for start in range(0, prompts_BT.shape[0], rows_per_forward):
            rows_BT = prompts_BT[start : start + rows_per_forward]
            result = model.generate(
                rows_BT,
                attention_mask=torch.ones_like(rows_BT),
                do_sample=False,
                max_new_tokens=model.num_future_tokens + 1,
                return_dict_in_generate=True,
            )
            if result.acceptance.interrupted:
                # The engine gives back what it has on Ctrl-C; half a batch is no measurement.
                raise KeyboardInterrupt
            lengths += [blocks[0] for blocks in result.acceptance.lengths if blocks]
    return summarize_blocks(lengths, num_draft_tokens=model.num_future_tokens - 1)
