"""Medusa heads computed from their tensors alone: what the layouts mean.

Legend: B batch, T positions, N future tokens, V vocabulary, D width.

Source: Cai et al. 2024 (arXiv:2401.10774), section 2.1.1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.convert.lazy_model import LazyTensor, WeightChange
from headway.convert.medusa.tensors import MedusaTensors
from headway.convert.plain_folder import change_weights, load_plain


def medusa_logits(
    base: Path, tensors: MedusaTensors, tokens_BT: Tensor, *, change: WeightChange | None = None
) -> Tensor:
    """Logits [B, T, N, V] in float32: the base's own, then each head's.

    Args:
        base: folder of the plain base.
        tensors: of the heads; a head without an output matrix uses the base's.
        tokens_BT: token ids.
        change: applied to every weight, in float32, before it is used.
    """

    def weight(tensor: LazyTensor) -> Tensor:
        values = tensor.read().float()
        return values if change is None else change(values)

    causal_lm = load_plain(base)
    change_weights(causal_lm, change)
    with torch.no_grad():
        hidden_BTD = causal_lm.base_model(tokens_BT, use_cache=False).last_hidden_state
        logits = [causal_lm(tokens_BT, use_cache=False).logits]
        for head in range(tensors.num_heads):
            deeper_BTD = hidden_BTD
            for block in range(tensors.num_blocks):
                bias = tensors.blocks.get((head, block, "bias"))
                inner_BTD = F.linear(
                    deeper_BTD,
                    weight(tensors.blocks[head, block, "weight"]),
                    None if bias is None else weight(bias),
                )
                deeper_BTD = deeper_BTD + F.silu(inner_BTD)
            own = tensors.unembeddings.get(head)
            logits.append(F.linear(deeper_BTD, causal_lm.lm_head.weight if own is None else weight(own)))
    return torch.stack(logits, dim=2)
