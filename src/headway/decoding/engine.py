"""`generate`: the entry of decoding, reached through transformers' own.

`MultiTokenLM.generate` comes here; requests that cannot be served are refused; transformers' `GenerationMixin.generate`
then prepares ids, mask, configuration, processors, criteria and streamer as it does for every model and calls the
model's `_sample`, which comes back here with everything ready. That is why streamers, stop strings, tokenizers and all
processors work.

What holds:

* Greedy decoding drafts with the heads (`num_draft_tokens=n-1` unless told otherwise) and emits exactly the tokens of
  plain greedy decoding. With `do_sample=True` one token is drawn per forward, and the result says so.
* Padding may be on either side. It is what `attention_mask` says. Without a mask transformers infers one: every
  token equal to `pad_token_id` is padding, inside a prompt too (this is logged), unless that id is not set or is also
  an end-of-sequence id; then everything counts as a token. Pass the mask where prompts are padded.
* The model runs in eval behaviour whatever mode it is in, so dropout and gradient checkpointing have no effect; the
  mode is restored. Layers compiled with `torch.compile` run eagerly here: every new length would compile again.
* `use_cache` changes nothing: the engine always keeps its own cache.
* Ctrl-C returns what was generated so far; the result's statistics have `interrupted=True`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from headway.decoding.choosing import Chooser, GreedyChooser
from headway.decoding.executor import EagerExecutor
from headway.decoding.loop import DecodingLoop
from headway.decoding.prompts import (
    Prompts,
    align_prompts,
    check_ids,
    check_mask,
    has_inner_padding,
    infer_mask,
    pad_left,
)
from headway.decoding.refusals import (
    check_leftovers,
    check_new_tokens,
    check_positions,
    check_prepared,
    check_request,
    check_streamer,
    resolve_num_draft_tokens,
    resolve_option,
)
from headway.decoding.scored import PrefixGate, ScoredChooser
from headway.errors import DecodingError
from headway.model.decoding_engine import register_engine

logger = logging.getLogger(__name__)

_SAMPLING_NOTE = "do_sample=True: drafts are for greedy decoding, one token was drawn per forward"
_STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


@dataclass(frozen=True)
class _Request:
    """What `generate` was asked beyond what transformers carries through to `_sample`."""

    num_draft_tokens: int | None = None
    given_BT: Tensor | None = None
    gate: PrefixGate | None = None
    stepwise: bool = False


_current_request: ContextVar[_Request | None] = ContextVar("headway_generation_request", default=None)


@contextmanager
def decoding_context(model: Any) -> Iterator[None]:
    """Eval behaviour, no autograd and no recompilation while the loop runs; everything is restored afterwards."""
    in_training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in in_training:
                module.training = False
            yield
        finally:
            for module in in_training:
                module.training = True


class Engine:
    """The decoding engine that `MultiTokenLM` delegates to."""

    def generate(
        self, model: Any, inputs: Tensor | None = None, *, num_draft_tokens: int | None = None, **kwargs: Any
    ) -> Any:
        """Generate as `transformers.GenerationMixin.generate` would, with several tokens per forward.

        Args:
            model: a `MultiTokenLM`.
            inputs: token ids [B, T], also as `input_ids=`; without any, the bos token starts the text.
            num_draft_tokens: drafted tokens per forward, 0..n-1; None for n-1; 0 decodes one token per forward.
            kwargs: transformers' own arguments.

        Returns:
            `sequences` [B, T + new], or `GenerationResult` with `return_dict_in_generate=True`.

        Raises:
            DecodingError: a request that the engine does not serve; the message names the way out.
        """
        return self._prepare(model, inputs, num_draft_tokens=num_draft_tokens, stepwise=False, **kwargs)

    def start(
        self, model: Any, inputs: Tensor | None = None, *, num_draft_tokens: int | None = None, **kwargs: Any
    ) -> DecodingLoop:
        """The loop that `generate` would run, before its first step."""
        if kwargs.get("streamer") is not None:
            raise DecodingError("a loop that is stepped by hand has no streamer; read the tokens of each step instead")
        loop: DecodingLoop = self._prepare(model, inputs, num_draft_tokens=num_draft_tokens, stepwise=True, **kwargs)
        return loop

    def _prepare(
        self, model: Any, inputs: Tensor | None, *, num_draft_tokens: int | None, stepwise: bool, **kwargs: Any
    ) -> Any:
        check_request(kwargs, model)
        resolve_num_draft_tokens(num_draft_tokens, num_future_tokens=model.num_future_tokens)
        given_BT = inputs if inputs is not None else kwargs.get("input_ids")
        if given_BT is not None:
            check_ids(given_BT)
            check_streamer(kwargs.get("streamer"), given_BT)
            check_new_tokens(kwargs, model, given_BT.shape[1])
            mask_BT = kwargs.get("attention_mask")
            if mask_BT is None:
                mask_BT = self._infer_mask(given_BT, kwargs, model)
            if mask_BT is not None:
                check_mask(given_BT, mask_BT)
                left_BT, kwargs["attention_mask"] = pad_left(given_BT, mask_BT.to(given_BT.device))
                inputs = left_BT if inputs is not None else None
                if inputs is None:
                    kwargs["input_ids"] = left_BT
        gate = None
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            gate = kwargs["prefix_allowed_tokens_fn"] = PrefixGate(kwargs["prefix_allowed_tokens_fn"])
        token = _current_request.set(
            _Request(
                num_draft_tokens=num_draft_tokens,
                given_BT=given_BT,
                gate=gate,
                stepwise=stepwise,
            )
        )
        try:
            return GenerationMixin.generate(model, inputs, **kwargs)
        finally:
            _current_request.reset(token)

    def _infer_mask(self, given_BT: Tensor, arguments: dict[str, Any], model: Any) -> Tensor | None:
        eos = resolve_option("eos_token_id", arguments, model)
        mask_BT = infer_mask(
            given_BT,
            pad_token_id=resolve_option("pad_token_id", arguments, model),
            eos_token_ids=[] if eos is None else torch.as_tensor(eos).reshape(-1).tolist(),
        )
        if mask_BT is not None and has_inner_padding(mask_BT):
            logger.warning(
                "a prompt holds pad_token_id between other tokens and no attention_mask was given: those tokens are "
                "left out, as transformers does; pass attention_mask=torch.ones_like(input_ids) to keep them"
            )
        return mask_BT

    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Transformers' sampling step: everything is prepared, run the loop.

        Args:
            model: a `MultiTokenLM`.
            input_ids: prompts [B, T].
            logits_processor: list.
            stopping_criteria: list.
            generation_config: merged and complete.
            synced_gpus: refused.
            streamer: gets every new token once and in order; its prompt has been put already.
            model_kwargs: the mask, and what transformers prepares for a loop of its own.

        Returns:
            As `generate`.

        Raises:
            DecodingError: see `headway.decoding.refusals`.
        """
        request = _current_request.get() or _Request()
        try:
            check_prepared(generation_config, synced_gpus=synced_gpus)
            check_leftovers(model_kwargs)
            check_streamer(streamer, input_ids)
            vocabulary = model.get_input_embeddings().num_embeddings
            prompts = align_prompts(input_ids, model_kwargs.get("attention_mask"), vocabulary=vocabulary)
            with torch.inference_mode():
                loop = self._loop(
                    model, request, input_ids, prompts, logits_processor, stopping_criteria, generation_config, streamer
                )
            if request.stepwise:
                return loop
            with decoding_context(model):
                loop.run()
        finally:
            if streamer is not None:
                streamer.end()
        result = loop.result()
        return result if generation_config.return_dict_in_generate else result.sequences

    def _loop(
        self,
        model: Any,
        request: _Request,
        history_BT: Tensor,
        prompts: Prompts,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
    ) -> DecodingLoop:
        limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
        if not limits:
            raise DecodingError("generation needs a limit; pass max_new_tokens")
        max_new_tokens = max(1, min(limits) - history_BT.shape[1])
        check_positions(model.config, prompts.lengths, max_new_tokens)
        drafts = resolve_num_draft_tokens(request.num_draft_tokens, num_future_tokens=model.num_future_tokens)
        do_sample = bool(generation_config.do_sample)
        note = _SAMPLING_NOTE if do_sample and drafts else None
        drafts = 0 if do_sample else drafts
        for processor in logits_processor:
            if drafts and isinstance(processor, _STATEFUL_PROCESSORS):
                raise DecodingError(
                    f"{type(processor).__name__} keeps a state from token to token, which drafted tokens would "
                    f"disturb; pass num_draft_tokens=0"
                )
        pad = generation_config._pad_token_tensor
        pad_token_id = 0 if pad is None else int(pad)
        plain_limits = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria)
        chooser: Chooser
        if plain_limits and not do_sample and not logits_processor:
            ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
            chooser = GreedyChooser(frozenset(token for ids in ends for token in ids))
        else:
            chooser = ScoredChooser(
                history_BT,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                do_sample=do_sample,
                gate=request.gate,
            )
        return DecodingLoop(
            executor=EagerExecutor(model, prompts, max_new_tokens=max_new_tokens, num_draft_tokens=drafts),
            chooser=chooser,
            prompts=prompts,
            given_BT=self._as_given(request, history_BT),
            num_future_tokens=model.num_future_tokens,
            num_draft_tokens=drafts,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            streamer=streamer,
            note=note,
        )

    def _as_given(self, request: _Request, history_BT: Tensor) -> Tensor:
        """The prompts as the caller passed them, repeated as transformers repeats them for several samples each."""
        if request.given_BT is None:
            return history_BT
        return request.given_BT.repeat_interleave(history_BT.shape[0] // request.given_BT.shape[0], dim=0)


ENGINE = Engine()
register_engine(ENGINE)
