"""Sequential modules: each depth reads the depth before it and the embedding of the token in between.

Legend: B batch, T positions, W positions of one pass, D width, L layers of the base.

    h_k'(t) = M_k [norm(h_{k-1}(t)); norm(e(x_{t+k-1}))]          M_k of D x 2D, two norms
    h_k = layer_k(h_k')                                           one decoder layer of the family, offsets k = 2..n

h_1 is the base's hidden state after its final norm (with `tap_back=j` what layer L - j gives, after that norm); h_k goes
through the shared final norm and unembedding. With `fuse_layers` h_1 = F [r_low; r_middle; r_high] instead, F of D x 3D, of the
residual stream before three layers (`fused_layers`; EAGLE-3). With
`share_modules` one module serves every depth (FastMTP). With `own_output_norm` each module ends with a norm of its own
instead of the base's, and hands the normed state to the next depth (released checkpoints: `shared_head.norm`). The order
of the concatenation is the paper's, hidden state first; released checkpoints have the embedding first.

Keys and values: depth k keeps its own, at cache index L + k - 2, also where modules are shared. The entry of position p
depends on the tokens up to p + k - 1, so after a draft was rejected the last ones are wrong. A pass therefore repeats the
`lookback` = K - 1 known positions before the last known token (K drafted tokens): with them every depth computes again
exactly the entries that a wrong draft could have entered, before anything reads them.

Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2; FastMTP (arXiv:2509.18362); EAGLE-3 (arXiv:2503.01840), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.heads.base import (
    ChainedHeads,
    Choose,
    DraftPoint,
    DraftStep,
    HeadInputs,
    LayerCall,
    Reading,
    TokenReadingHeads,
)
from headway.heads.draft_paths import PathDraft
from headway.heads.lanes import Lanes
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts, place_in_cache


class SequentialModule(nn.Module):
    """Projection of a hidden state and an embedding, then one decoder layer."""

    def __init__(self, parts: BaseParts, *, cache_index: int, own_output_norm: bool) -> None:
        super().__init__()
        self.hidden_norm = parts.new_norm()
        self.embedding_norm = parts.new_norm()
        self.projection = parts.linear(2 * parts.width, parts.width)
        self.layer = parts.decoder_layer(cache_index)
        self.output_norm = parts.new_norm() if own_output_norm else None

    def forward(self, call: LayerCall, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Hidden states of the next depth."""
        both = torch.cat((self.hidden_norm(hidden_BTD), self.embedding_norm(embedded_BTD)), dim=-1)
        hidden_BTD = call.replay(self.layer, self.projection(both))
        if self.output_norm is not None:
            hidden_BTD = self.output_norm(hidden_BTD)
        return hidden_BTD


class SequentialHeads(ChainedHeads, TokenReadingHeads):
    """A chain of modules; offsets are drafted in turn."""

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        count = min(num_heads, 1) if options.share_modules else num_heads
        super().__init__(
            [
                SequentialModule(parts, cache_index=parts.num_layers + index, own_output_norm=options.own_output_norm)
                for index in range(count)
            ],
            num_heads=num_heads,
        )
        self.uses_final_norm = not options.own_output_norm
        self.reading = Reading("final_hidden", options.tap_back)
        # Beside the bodies, not inside the first: it runs outside their forward.
        self.fusion: nn.Linear | None = None
        if options.fuse_layers:
            self.reading = Reading("layer_inputs", layers=fused_layers(parts.num_layers))
            self.fusion = parts.linear(3 * parts.width, parts.width)
        self._first_cache_index = parts.num_layers

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """One per module."""
        return [body.layer for body in self.bodies]  # type: ignore[misc]

    def cache_layers(self, num_heads: int) -> int:
        """One per depth, also where depths share a module."""
        return num_heads

    def lookback(self, num_heads: int) -> int:
        """See the module's docstring."""
        return max(0, num_heads - 1)

    def start(self, inputs: HeadInputs) -> Tensor:
        """See `ChainedHeads.start`."""
        if self.fusion is None:
            return inputs.hidden_BTD
        fused_BTD: Tensor = self.fusion(inputs.hidden_BTD)
        return fused_BTD

    def link(self, inputs: HeadInputs, offset: int, before_BTD: Tensor) -> Tensor:
        """See `ChainedHeads.link`."""
        return self._deepen(offset - 1, inputs.call, before_BTD, inputs.embedded(offset - 1))

    def drafted_hidden(self, inputs: HeadInputs, *, num_heads: int, choose: Choose) -> tuple[Tensor, ...]:
        """See `TokenReadingHeads.drafted_hidden` and `headway.heads.lanes`."""
        lanes = Lanes(inputs.call, self.decoder_layers[0])
        # Per lane its states at the depth before; the teacher-forced lane first, then those that read older drafts.
        before = [self.start(inputs)]
        embedded_drafts: list[Tensor] = []
        future: list[Tensor] = []
        for depth in range(1, num_heads + 1):
            embedded_BXD = torch.cat((inputs.embedded(depth), *embedded_drafts), dim=1)
            hidden_BXD = self._deepen(depth, lanes.call(depth), torch.cat(before, dim=1), embedded_BXD)
            states = torch.split(hidden_BXD, before[0].shape[1], dim=1)
            future.append(states[-1])
            if depth < num_heads:
                embedded_drafts.append(inputs.embed(choose(states[-1], depth + 1)))
                # At the next depth the oldest lane leaves the teacher-forced one, `depth - 1` positions before its start.
                before = [states[0], states[0].roll(depth - 1, dims=1), *states[1:]]
        return tuple(future)

    def begin_draft(self, point: DraftPoint) -> DraftStep:
        """See `Heads.begin_draft`: every depth runs over all positions of the pass, the repeated ones included."""
        if point.places is not None:
            hidden_BWD, layer = self.start(point.inputs), self.decoder_layers[0]
            return PathDraft(point, point.places, hidden_BWD, deepen=self._deepen, layer=layer)
        rows_B = torch.arange(point.tokens_BW.shape[0], device=point.tokens_BW.device)
        width = point.tokens_BW.shape[1]
        room = point.tokens_BW.new_zeros(point.tokens_BW.shape[0], self.num_heads)
        text_BX = torch.cat((point.tokens_BW, room), dim=1)
        hidden_BWD = self.start(point.inputs)

        def step(offset: int, tokens_B1: Tensor, parents_B1: Tensor | None) -> Tensor:
            nonlocal hidden_BWD
            depth = offset - 1
            text_BX[rows_B, point.columns_B + depth] = tokens_B1.squeeze(1)
            embedded_BWD = point.inputs.embed(text_BX[:, depth : depth + width])
            hidden_BWD = self._deepen(depth, point.inputs.call, hidden_BWD, embedded_BWD)
            return point.at(hidden_BWD)[:, None]

        return step

    def _deepen(self, depth: int, call: LayerCall, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Depth `depth` (offset depth + 1) from the one before it."""
        module = self.bodies[min(depth, len(self)) - 1]
        place_in_cache(module, self._first_cache_index + depth - 1)
        deeper_BTD: Tensor = module(call, hidden_BTD, embedded_BTD)
        return deeper_BTD


def fused_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers, counted from 0, before which a fused state reads: low, middle, high.

    From 8 layers on they are those of EAGLE-3's code: 2, L / 2 and L - 3; below, they keep apart.

    >>> fused_layers(32), fused_layers(4), fused_layers(3)
    ((2, 16, 29), (1, 2, 3), (0, 1, 2))
    """
    middle = num_layers // 2
    return min(2, num_layers // 4), middle, max(num_layers - 3, middle + 1)
