"""`LeanModel`: base and heads on fused decoder blocks, with the calls that the executor makes.

Legend: B rows, M positions of one forward, D width, V vocabulary, L layers of the base.

The Hugging Face model stays the truth: `LeanModel` holds copies of its weights in another layout, is admitted only when its
logits agree (`headway.decoding.lean.admission`), and is made anew when a weight has changed. Heads run as they are, whatever
their architecture: where they call a decoder layer of the family, they get the lean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from headway.decoding.cache import attention_windows
from headway.decoding.lean.few_rows import MOST_ROWS, FewRows
from headway.decoding.lean.integers import Quantizer
from headway.decoding.lean.layer import LeanLayer, RMSNorm
from headway.decoding.lean.likeliest import LikeliestDraft
from headway.decoding.lean.linear import FusedLinear, Way, fastest_way
from headway.decoding.lean.markov import LeanMarkov
from headway.decoding.lean.native import instructions
from headway.decoding.lean.pages import move_to_huge_pages
from headway.decoding.lean.passes import LeanPass
from headway.decoding.lean.stack import LayerStack, serves
from headway.decoding.masks import ChainMasks
from headway.functional.rotary import signed_sine
from headway.heads.base import HeadInputs, LayerCall, Reading
from headway.heads.call_arguments import select
from headway.heads.linear import LinearHeads
from headway.model.output import OffsetHiddenStates

INT8_NOTE = "weights rounded to int8, one scale per output: another model than the checkpoint"


@dataclass(frozen=True)
class LeanCall(LayerCall):
    """A layer call that runs lean layers in place of the family's.

    Attributes:
        run: what the layers of this forward share.
        layers: id of a family layer -> its lean counterpart.
    """

    run: LeanPass
    layers: dict[int, LeanLayer]

    def replay(self, layer: nn.Module, hidden_BTD: Tensor | None = None) -> Tensor:
        """See `LayerCall.replay`."""
        index = cast(Any, layer).self_attn.layer_idx
        hidden_BMD = self.hidden_BTD if hidden_BTD is None else hidden_BTD
        run = self.run
        if getattr(run.cache, "hidden", None):
            run = replace(run, masks={window: run.cache.hide(index, run.mask(window)) for window in run.masks})
        return self.layers[id(layer)](hidden_BMD, run, cache_index=index)

    def moved(self, layer: nn.Module, columns_BX: Tensor, mask_B1XS: Tensor) -> LeanCall:
        """See `LayerCall.moved`."""
        window = self.layers[id(layer)].window
        positions_BX = select(self.run.position_ids_BM, columns_BX)
        run = replace(self.run, position_ids_BM=positions_BX, masks={window: mask_B1XS})
        return replace(self, hidden_BTD=select(self.hidden_BTD, columns_BX), run=run)

    def without_cache(self) -> LeanCall:
        """See `LayerCall.without_cache`."""
        run = replace(self.run, cache=None)
        return LeanCall(self.hidden_BTD, self.args, self.kwargs, run, self.layers)


class LeanModel:
    """What `headway.decoding.executor` asks of a model, on lean layers; without gradients.

    Attributes:
        config: the base's.
        heads: the model's own.
        way: how products are made.
        num_bytes: of the copies of weights.
        likeliest: the draft of heads that share the unembedding in one call; None where the kernel cannot make it.
        markov: the bias of the previous token by the kernel; None where there is no bias or no kernel.
        huge_page_bytes: of the weights that were moved to huge pages (`headway.decoding.lean.pages`).
        versions: of the weights when they were read.
    """

    def __init__(self, model: Any, *, way: Way | None = None) -> None:
        """Read the weights of a `MultiTokenLM` of an admitted family.

        Args:
            model: in eval behaviour during every call.
            way: how products are made; None for the fastest.
        """
        self._model = model
        self.config = model.config
        self.heads = model.heads
        self.way: Way = fastest_way(model.family.lm_head.weight) if way is None else way
        # Other ways keep copies in layouts of their own.
        self.huge_page_bytes = move_to_huge_pages(model) if self.way == "kernel" else 0
        self.versions = weight_versions(model)
        base_layers, head_layers = list(model.family.layers), list(model.heads.decoder_layers)
        windows = attention_windows(model.config, num_heads=0)
        quantizer = Quantizer() if self.way == "int8" else None
        fused = partial(FusedLinear, way=self.way, quantizer=quantizer)
        self._base = [
            LeanLayer(layer, window=window, way=self.way, quantizer=quantizer)
            for layer, window in zip(base_layers, windows, strict=True)
        ]
        heads = [LeanLayer(layer, window=windows[-1], way=self.way, quantizer=quantizer) for layer in head_layers]
        self._lean = dict(zip(map(id, [*base_layers, *head_layers]), [*self._base, *heads], strict=True))
        self._windows = set(windows)
        self._norm = RMSNorm(model.family.norm)
        weights = [layer.weights for layer in self._base if layer.weights is not None]
        whole = len(weights) == len(self._base) and weights[0].eps == self._norm.eps
        self._stack = LayerStack(weights, final_norm=self._norm) if whole else None
        unembedding = model.family.lm_head
        self._unembedding = fused([unembedding])
        by_kernel = self.way in ("kernel", "int8")
        linear = by_kernel and isinstance(model.heads, LinearHeads)
        self._linear_heads = [fused([body]) for body in model.heads] if linear else None
        self._heads_at_once: FewRows | None = None
        if self._linear_heads:
            maps = [matrix for head in self._linear_heads for matrix in head.matrices]
            self._heads_at_once = FewRows(maps, unembedding.weight.dtype)
        markov = model.heads.markov
        self.markov = LeanMarkov(markov) if by_kernel and markov is not None else None
        self.likeliest: LikeliestDraft | None = None
        if (
            self.way == "kernel"
            and self._stack is not None
            and model.heads.unembeddings is None
            and not model.heads.reads_tokens
        ):
            norm = self._norm if model.heads.uses_final_norm else None
            self.likeliest = LikeliestDraft(self._unembedding.matrices[0], norm=norm, markov=self.markov)
        own = [model.heads.unembedding(offset) for offset in range(2, model.num_future_tokens + 1)]
        self._own = [None if linear is None else fused([linear]) for linear in own]
        self.num_bytes = (
            sum(layer.num_bytes for layer in self._lean.values())
            + self._unembedding.num_bytes
            + sum(linear.num_bytes for linear in self._own if linear is not None)
        )
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    @property
    def num_future_tokens(self) -> int:
        """N."""
        return int(self._model.num_future_tokens)

    @property
    def description(self) -> str:
        """How steps are made, in words."""
        if self.way not in ("kernel", "int8"):
            return f"{self.way} products"
        layers = list(self._lean.values())
        whole = sum(layer.weights is not None for layer in layers)
        pages = f"{self.huge_page_bytes / 2**20:.0f} MiB of weights" if self.huge_page_bytes else "no weights"
        if self.way == "int8":
            pages = f"{INT8_NOTE}; {self.num_bytes / 2**20:.0f} MiB of copies"
            return f"C++ kernel, {instructions()}; {whole} of {len(layers)} layers as one call; {pages}"
        return f"C++ kernel, {instructions()}; {whole} of {len(layers)} layers as one call; {pages} in huge pages"

    @property
    def up_to_date(self) -> bool:
        """Whether the weights are still those that were read."""
        return weight_versions(self._model) == self.versions

    def get_input_embeddings(self) -> nn.Module:
        """The base's token embeddings."""
        return cast(nn.Module, self._model.get_input_embeddings())

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The base's final norm."""
        return self._norm(hidden)

    def unembed(self, hidden: Tensor) -> Tensor:
        """See `MultiTokenLM.unembed`."""
        return cast(Tensor, self._model.family.soft_cap(self._unembedding(hidden)))

    @property
    def family(self) -> Any:
        """The base's parts and habits (`headway.model.families`)."""
        return self._model.family

    def unembedding(self, offset: int) -> FusedLinear:
        """The product with the output matrix of an offset."""
        own = None if offset == 1 else self._own[offset - 2]
        return own or self._unembedding

    def before_unembedding(self, hidden: Tensor, *, offset: int) -> Tensor:
        """See `MultiTokenLM.before_unembedding`."""
        return self._norm(hidden) if offset > 1 and self.heads.uses_final_norm else hidden

    def offset_logits(self, hidden: Tensor, *, offset: int, previous: Tensor | None = None) -> Tensor:
        """See `MultiTokenLM.offset_logits`; `previous` are real tokens here."""
        logits = self.unembedding(offset)(self.before_unembedding(hidden, offset=offset))
        if offset > 1 and self.heads.markov is not None:
            logits = logits + self.heads.markov(previous)
        return cast(Tensor, self._model.family.soft_cap(logits))

    def offset_hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Any,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool = True,
        num_offsets: int | None = None,
    ) -> OffsetHiddenStates:
        """See `MultiTokenLM.offset_hidden_states`.

        Args:
            input_ids: [B, M].
            attention_mask: additive, one or one per layer type; None for a causal pass from slot 0, and for a single
                position that sees all visible slots.
            position_ids: [B or 1, M].
            past_key_values: a `RaggedCache`.
            use_cache: always on here.
            num_offsets: heads beyond this offset are not run.
        """
        run = self._begin(input_ids, attention_mask, position_ids, past_key_values)
        hidden_BMD: Tensor = self.get_input_embeddings()(input_ids)
        last = len(self._base) - 1
        spliced: tuple[Tensor, ...] = ()
        states: Sequence[Tensor] | Tensor
        if self.heads.changes_base and self.heads.num_heads:
            states, _ = self._through(hidden_BMD, run, 0, last)
            call = LeanCall(states[last], (), {}, run, self._lean)
            spliced = self.heads.splice(call)
            after, last_hidden_BMD = self._through(spliced[0], run, last, last + 1)
            states = [*states, after[1]]
        else:
            states, last_hidden_BMD = self._through(hidden_BMD, run, 0, last + 1)
            call = LeanCall(states[last], (), {}, run, self._lean)
        assert last_hidden_BMD is not None
        inputs = HeadInputs(
            hidden_BTD=self._reading(states, last_hidden_BMD),
            call=call,
            embed=self.get_input_embeddings(),
            spliced=spliced,
        )
        wanted = self.num_future_tokens if num_offsets is None else num_offsets
        future = self._future(inputs, num_heads=wanted - 1) if wanted > 1 else ()
        return OffsetHiddenStates(
            last_hidden_BTD=last_hidden_BMD,
            future_hidden=future,
            head_inputs=inputs if self.heads.autoregressive else None,
            past_key_values=past_key_values,
        )

    def _future(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`."""
        if self._linear_heads is None:
            return cast(tuple[Tensor, ...], self.heads.future_hidden(inputs, num_heads=num_heads))
        hidden_BTD = inputs.hidden_BTD
        rows = hidden_BTD.shape[0] * hidden_BTD.shape[1]
        if self._heads_at_once is None or rows > MOST_ROWS:
            return tuple(head(hidden_BTD) for head in self._linear_heads[:num_heads])
        hidden_RD = hidden_BTD.reshape(rows, -1).contiguous()
        future_KRD = hidden_RD.new_empty(num_heads, *hidden_RD.shape)
        self._heads_at_once(hidden_RD, future_KRD)
        return future_KRD.view(num_heads, *hidden_BTD.shape).unbind()

    def _through(
        self, hidden_BMD: Tensor, run: LeanPass, begin: int, end: int
    ) -> tuple[Sequence[Tensor] | Tensor, Tensor | None]:
        """Layers begin .. end - 1: their input and what each gives; and after the last layer its normed output."""
        if self._stack is not None and serves(hidden_BMD, run):
            return self._stack.run(hidden_BMD, run, first=begin, count=end - begin)
        states = [hidden_BMD]
        for index in range(begin, end):
            states.append(self._base[index](states[-1], run, cache_index=index))
        return states, self._norm(states[-1]) if end == len(self._base) else None

    def _reading(self, states: Sequence[Tensor] | Tensor, last_hidden_BMD: Tensor) -> Tensor:
        """Where the heads read: item i of `states` is what layer i gets, the last one what the last layer gives."""
        reading: Reading = self.heads.reading
        if reading.point == "layer_input":
            return states[-2 - reading.layers_back]
        if reading.point == "layer_inputs":
            return torch.cat([states[index] for index in reading.layers], dim=-1)
        if reading.point == "final_residual":
            return states[-1]
        return self._norm(states[-1 - reading.layers_back]) if reading.layers_back else last_hidden_BMD

    def _begin(self, input_ids: Tensor, attention_mask: Any, position_ids: Tensor, cache: Any) -> LeanPass:
        rotary = self._rotary(int(cache.capacity) if cache is not None else int(position_ids.max()) + 1)
        return LeanPass(rotary, position_ids, self._masks(attention_mask, positions=input_ids.shape[1]), cache)

    def _masks(self, attention_mask: Any, *, positions: int) -> dict[int | None, Tensor | ChainMasks | None]:
        if attention_mask is None:
            return {} if positions > 1 else dict.fromkeys(self._windows)
        if isinstance(attention_mask, ChainMasks):
            return dict.fromkeys(self._windows, attention_mask)
        if isinstance(attention_mask, dict):
            window = getattr(self.config, "sliding_window", None)
            return {window if kind == "sliding_attention" else None: mask for kind, mask in attention_mask.items()}
        return dict.fromkeys(self._windows, attention_mask)

    def _rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """Tables [positions or more, r] made by the family's own module."""
        if self._cos_sin is None or self._cos_sin[0].shape[0] < positions:
            like = self._model.family.lm_head.weight[:1, :1]
            length = 1 << max(6, (positions - 1).bit_length())
            index_1C = torch.arange(length, device=like.device)[None]
            cos_1Cr, sin_1Cr = self._model.family.decoder.rotary_emb(like, index_1C)
            self._cos_sin = cos_1Cr[0].contiguous(), signed_sine(sin_1Cr[0])
        return self._cos_sin


def weight_versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Where each weight lies and how often it was written: another value means that a copy of the weights is stale."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in model.parameters())
