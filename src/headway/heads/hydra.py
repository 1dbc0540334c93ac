"""Hydra heads: Medusa-like, but an offset also sees the embeddings of the tokens before it.

Legend: B batch, T positions, X nodes of one depth of a draft, E what a path has seen, D width, V vocabulary.

    u_k = [h_t; e(x_{t+1}); ...; e(x_{t+k-1})]                        k x D wide
    logits_k = U_k g_m(... g_2(R_k u_k + SiLU(W_k u_k + b_k))),       g_j(x) = x + SiLU(W_j x + b_j)

with h the base's hidden state after its final norm (with `tap_back=j` what layer L - j gives, after that norm) and e its
token embedding. W and b start at zero; R_k as [I 0 ... 0]
and U_k as a copy of the base's unembedding, so every head begins as the next-token head. In training the tokens are the
text's, in decoding those drafted so far.

Source: Ankner et al. 2024 (arXiv:2402.05109) and its code (hydra_heads/mlp_head.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.heads.base import Choose, DraftPoint, DraftStep, HeadInputs, ParallelHeads, Reading, TokenReadingHeads
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts
from headway.heads.silu_block import SiluBlock, zero_linear


class HydraBody(nn.Module):
    """The map of one offset from its hidden state and the embeddings before it."""

    def __init__(self, parts: BaseParts, *, offset: int, blocks: int) -> None:
        super().__init__()
        width = parts.width
        self.skip = parts.linear(offset * width, width)
        self.inner = zero_linear(parts, offset * width, width)
        self.blocks = nn.Sequential(*(SiluBlock(parts) for _ in range(blocks - 1)))
        if not parts.fresh:
            with torch.no_grad():
                self.skip.weight.copy_(torch.eye(width, offset * width))

    def forward(self, *parts: Tensor) -> Tensor:
        """Hidden states of this offset, ready for its unembedding, from `offset` tensors [..., D]."""
        hidden = _of_concatenation(parts, self.skip) + F.silu(_of_concatenation(parts, self.inner))
        deeper: Tensor = self.blocks(hidden)
        return deeper

    def of_concatenated(self, seen: Tensor) -> Tensor:
        """The same from one tensor [..., offset x D]: fewer products, for a draft, where there are few positions."""
        deeper: Tensor = self.blocks(self.skip(seen) + F.silu(self.inner(seen)))
        return deeper


class HydraHeads(ParallelHeads, TokenReadingHeads):
    """One map per offset; offsets are drafted in turn."""

    uses_final_norm = False

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        own = options.own_unembedding is not False
        super().__init__(
            [HydraBody(parts, offset=index + 2, blocks=options.blocks_per_head) for index in range(num_heads)],
            num_heads=num_heads,
            unembeddings=parts.new_unembeddings(num_heads) if own else None,
        )
        self.reading = Reading("final_hidden", options.tap_back)

    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """See `ParallelHeads.head`."""
        seen = [inputs.hidden_BTD, *(inputs.embedded(ahead) for ahead in range(1, offset))]
        hidden_BTD: Tensor = self.bodies[offset - 2](*seen)
        return hidden_BTD

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`; embeddings are looked up once for all heads."""
        seen, future = [inputs.hidden_BTD], []
        for index, body in enumerate(self.bodies[:num_heads]):
            seen.append(inputs.embedded(index + 1))
            future.append(body(*seen))
        return tuple(future)

    def drafted_hidden(self, inputs: HeadInputs, *, num_heads: int, choose: Choose) -> tuple[Tensor, ...]:
        """See `TokenReadingHeads.drafted_hidden`."""
        seen, future = [inputs.hidden_BTD, inputs.embedded(1)], []
        for offset in range(2, num_heads + 2):
            future.append(self.bodies[offset - 2](*seen))
            if offset <= num_heads:
                seen.append(inputs.embed(choose(future[-1], offset)))
        return tuple(future)

    def begin_draft(self, point: DraftPoint) -> DraftStep:
        """See `Heads.begin_draft`: what a path has seen is carried along, for every node its own."""
        seen_BXE = point.at(point.inputs.hidden_BTD)[:, None]

        def step(offset: int, tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
            nonlocal seen_BXE
            if parents_BX is not None:
                seen_BXE = seen_BXE.gather(1, parents_BX[..., None].expand(-1, -1, seen_BXE.shape[-1]))
            seen_BXE = torch.cat((seen_BXE, point.inputs.embed(tokens_BX)), dim=-1)
            hidden_BXD: Tensor = cast(HydraBody, self.bodies[offset - 2]).of_concatenated(seen_BXE)
            return hidden_BXD

        return step


def _of_concatenation(parts: Sequence[Tensor], linear: nn.Linear) -> Tensor:
    """`linear` of the concatenated parts, one part at a time: the concatenation of many offsets is never in memory."""
    # Split, not sliced: the gradient of a slice is as large as the whole weight.
    pieces = torch.split(linear.weight, parts[0].shape[-1], dim=1)
    total = F.linear(parts[0], pieces[0], linear.bias)
    for part, piece in zip(parts[1:], pieces[1:], strict=True):
        total = total + F.linear(part, piece)
    return total
