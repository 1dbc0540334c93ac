"""`generate`: the entry of decoding, reached through transformers' own.

`MultiTokenLM.generate` comes here; requests that cannot be served are refused; transformers' `GenerationMixin.generate`
then prepares ids, mask, configuration, processors, criteria and streamer as it does for every model and calls the
model's `_sample`, which comes back here with everything ready. That is why streamers, stop strings, tokenizers and all
processors work.

What holds:

* Greedy decoding drafts with the heads (`num_draft_tokens=n-1` unless told otherwise) and emits exactly the tokens of
  plain greedy decoding. Drafts may be trees, copied text, or both (`headway.decoding.options`).
* With `do_sample=True` every token follows the model's own distribution after all processors. It is a function of the
  seed, the row and the position, and of nothing else: the same seed gives the same text plainly, with drafts of any
  kind, and whatever else is in the batch (float32, up to rounding). Drawn drafts (`sample_drafts`) keep the
  distribution but not the text of the seed.
* Lossy acceptance rules are called so, in the result too (`lossless`, `note`).
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from headway.decoding.calibration.use import announce, with_calibration
from headway.decoding.choosing import Chooser, GreedyChooser
from headway.decoding.controller import DraftController, Experience
from headway.decoding.draft_vocabulary import SlicedDrafts, check_draft_vocabulary
from headway.decoding.drafting import (
    ChainDrafter,
    Drafter,
    DraftSeeds,
    DraftTexts,
    DrawnDrafter,
    LookupDrafter,
    TreeDrafter,
)
from headway.decoding.drawing import DrawnChooser, reads_scores_alone
from headway.decoding.executor import EagerExecutor
from headway.decoding.forward_costs import ForwardCosts
from headway.decoding.graphs.loop import GraphLoop
from headway.decoding.graphs.served import graph_executor
from headway.decoding.history import History, PrefixGate
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.model import INT8_NOTE, LeanModel
from headway.decoding.loop import DecodingLoop
from headway.decoding.options import (
    PLAIN,
    DecodingOptions,
    DraftPlan,
    acceptance_rule,
    lossy_note,
    plan_drafts,
    take_options,
)
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
    resolve_option,
)
from headway.decoding.scored import Recorder, RowSeeds, ScoredChooser
from headway.decoding.tree_drafting import DynamicTreeDrafter, PathTreeDrafter
from headway.errors import DecodingError
from headway.functional.acceptance import greedy_match, sample_and_match
from headway.functional.row_trees import DynamicTree
from headway.functional.tree import Tree
from headway.model.decoding_engine import register_engine

logger = logging.getLogger(__name__)

_STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def keeps_state(processor: Any) -> bool:
    """Whether a logits processor keeps a state from token to token, which drafted tokens would disturb."""
    return isinstance(processor, _STATEFUL_PROCESSORS)


@dataclass(frozen=True)
class _Request:
    """What `generate` was asked beyond what transformers carries through to `_sample`."""

    options: DecodingOptions = field(default_factory=DecodingOptions)
    given_BT: Tensor | None = None
    gate: PrefixGate | None = None
    stepwise: bool = False


_current_request: ContextVar[_Request | None] = ContextVar("headway_generation_request", default=None)


@contextmanager
def decoding_context(model: Any, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Eval behaviour, no autograd and no recompilation while the loop runs; everything is restored afterwards.

    Args:
        model: a `MultiTokenLM`.
        modules: all of its modules, for callers who enter for every forward: finding them takes longer than asking them.
    """
    in_training = [module for module in (model.modules() if modules is None else modules) if module.training]
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

    def __init__(self) -> None:
        self._experience: WeakKeyDictionary[Any, dict[Any, Experience]] = WeakKeyDictionary()

    def generate(self, model: Any, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as `transformers.GenerationMixin.generate` would, with several tokens per forward.

        Args:
            model: a `MultiTokenLM`.
            inputs: token ids [B, T], also as `input_ids=`; without any, the bos token starts the text.
            kwargs: `headway.decoding.options.DecodingOptions`, and transformers' own arguments.

        Returns:
            `sequences` [B, T + new], or `GenerationResult` with `return_dict_in_generate=True`.

        Raises:
            DecodingError: a request that the engine does not serve; the message names the way out.
        """
        return self._prepare(model, inputs, stepwise=False, **kwargs)

    def start(self, model: Any, inputs: Tensor | None = None, **kwargs: Any) -> DecodingLoop:
        """The loop that `generate` would run, before its first step."""
        if kwargs.get("streamer") is not None:
            raise DecodingError("a loop that is stepped by hand has no streamer; read the tokens of each step instead")
        loop: DecodingLoop = self._prepare(model, inputs, stepwise=True, **kwargs)
        return loop

    def _prepare(self, model: Any, inputs: Tensor | None, *, stepwise: bool, **kwargs: Any) -> Any:
        options = take_options(kwargs)
        check_request(kwargs, model)
        plan_drafts(options, model, do_sample=bool(resolve_option("do_sample", kwargs, model)))
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
                options=options,
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
        do_sample = bool(generation_config.do_sample)
        options, ignored = with_calibration(request.options, model, batch=prompts.batch)
        if ignored is not None:
            announce(ignored)
        plan = plan_drafts(options, model, do_sample=do_sample)
        plan, note = self._respect_state(plan, request.options, logits_processor, do_sample=do_sample)
        pad = generation_config._pad_token_tensor
        pad_token_id = 0 if pad is None else int(pad)
        plain_limits = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria)
        ends = frozenset(
            token
            for criterion in stopping_criteria
            if isinstance(criterion, EosTokenCriteria)
            for token in criterion.eos_token_id.tolist()
        )
        recorder = None
        if generation_config.return_dict_in_generate:
            recorder = self._recorder(generation_config, len(prompts.lengths))
        rule = acceptance_rule(request.options, plan, do_sample=do_sample)
        history = History(
            history_BT,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            gate=request.gate,
        )
        seeds = self._seeds(request.options, prompts.batch) if do_sample else None
        chooser: Chooser
        if plain_limits and rule is greedy_match and not logits_processor and recorder is None:
            chooser = GreedyChooser(ends)
        elif (
            plain_limits
            and rule is sample_and_match
            and seeds is not None
            and recorder is None
            and reads_scores_alone(logits_processor)
        ):
            chooser = DrawnChooser(ends, processors=logits_processor, seeds=seeds, max_new_tokens=max_new_tokens)
        else:
            chooser = ScoredChooser(
                history,
                rule=rule,
                seeds=seeds,
                end_token_ids=ends,
                other_criteria=not plain_limits,
                recorder=recorder,
            )
        executor: EagerExecutor
        on_graphs, eager_note = options.executor == "graph", None
        if on_graphs:
            executor = graph_executor(
                model,
                prompts,
                options,
                plan,
                max_new_tokens=max_new_tokens,
                processors=logits_processor,
                end_token_ids=ends,
                seeds=seeds,
                matches=rule in (greedy_match, sample_and_match),
                plain_limits=plain_limits,
                records=recorder is not None,
            )
        else:
            executor, eager_note = self.executor(model, prompts, options, plan, max_new_tokens)
        lossy = lossy_note(request.options, do_sample=do_sample) if plan.depth else None
        return (GraphLoop if on_graphs else DecodingLoop)(
            executor=executor,
            chooser=chooser,
            prompts=prompts,
            given_BT=self._as_given(request, history_BT),
            num_future_tokens=model.num_future_tokens,
            drafter=None if on_graphs else self.drafter(plan, request.options, executor, prompts, history, seeds, ends),
            num_draft_tokens=plan.depth,
            num_heads=plan.heads,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            streamer=streamer,
            note="; ".join(filter(None, (note, ignored, lossy, eager_note))) or None,
            acceptance_rule=request.options.acceptance,
            lossless=lossy is None and request.options.weights == "own",
            recorder=recorder,
            controller=self._controller(model, executor, plan, prompts.batch, type(chooser), do_sample)
            if plan.controlled
            else None,
        )

    def _controller(
        self, model: Any, executor: EagerExecutor, plan: DraftPlan, batch: int, chooser: type[Chooser], do_sample: bool
    ) -> DraftController:
        """One that knows what earlier generations of the same model, batch size and kind of decoding saw."""
        drafts = (plan.heads, plan.tree, plan.lookup, plan.sampled)
        kind = (
            type(executor),
            getattr(executor, "way", None),
            batch,
            drafts,
            chooser,
            do_sample,
            torch.get_num_threads(),
        )
        known = self._experience.setdefault(model, {})
        experience = known.setdefault(kind, Experience(ForwardCosts(batch=batch)))
        # How often a drawn draft is accepted cannot be seen from the text.
        return DraftController(plan.depth, experience=experience, trials=not plan.sampled)

    def _respect_state(
        self, plan: DraftPlan, options: DecodingOptions, logits_processor: Any, *, do_sample: bool
    ) -> tuple[DraftPlan, str | None]:
        """Processors that keep a state allow no drafts: decode plainly where nobody asked for drafts."""
        for processor in logits_processor:
            if plan.depth and keeps_state(processor):
                name = type(processor).__name__
                asked = replace(options, num_draft_tokens=None) if plan.controlled else options
                if do_sample and asked == DecodingOptions(seed=options.seed):
                    return PLAIN, f"{name} keeps a state from token to token: one token was drawn per forward"
                raise DecodingError(
                    f"{name} keeps a state from token to token, which drafted tokens would disturb; pass "
                    f"num_draft_tokens=0"
                )
        return plan, None

    def executor(
        self, model: Any, prompts: Prompts, options: DecodingOptions, plan: DraftPlan, max_new_tokens: int
    ) -> tuple[EagerExecutor, str | None]:
        """What runs the model, and why it is not what was asked for."""

        def drafting(run: Any) -> Any:
            if options.draft_vocabulary is None or not plan.heads:
                return run
            vocabulary = model.get_input_embeddings().num_embeddings
            return SlicedDrafts(run, model, check_draft_vocabulary(options.draft_vocabulary, vocabulary=vocabulary))

        if options.executor == "lean":
            lean = lean_model(model, weights=options.weights)
            if isinstance(lean, LeanModel):
                return LeanExecutor(
                    drafting(lean),
                    prompts,
                    max_new_tokens=max_new_tokens,
                    num_draft_tokens=plan.heads,
                    tree=plan.widest,
                    changing=plan.controlled,
                    prefill_chunk_tokens=options.prefill_chunk_tokens,
                ), INT8_NOTE if options.weights == "int8" else None
            if options.weights == "int8":
                raise DecodingError(f"weights='int8' cannot be had: {lean}; leave weights out")
            logger.warning("no lean executor, the model runs eagerly: %s", lean)
        executor = EagerExecutor(
            drafting(model),
            prompts,
            max_new_tokens=max_new_tokens,
            num_draft_tokens=plan.heads,
            tree=plan.widest,
            changing=plan.controlled,
            prefill_chunk_tokens=options.prefill_chunk_tokens,
        )
        return executor, f"no lean executor: {lean}" if options.executor == "lean" else None

    def _recorder(self, generation_config: Any, batch: int) -> Recorder | None:
        wanted = (bool(generation_config.output_scores), bool(generation_config.output_logits))
        return Recorder(batch, *wanted) if any(wanted) else None

    def _seeds(self, options: DecodingOptions, batch: int) -> RowSeeds:
        seed = options.seed
        if seed is None:
            return RowSeeds(int(torch.randint(2**62, ())))
        if isinstance(seed, int):
            return RowSeeds(seed)
        if len(seed) != batch:
            raise DecodingError(
                f"a list of seeds has one for each of the {batch} rows (prompts x num_return_sequences): got {len(seed)}; "
                f"pass one number for all, or {batch}"
            )
        return RowSeeds([int(number) for number in seed])

    def drafter(
        self,
        plan: DraftPlan,
        options: DecodingOptions,
        executor: EagerExecutor,
        prompts: Prompts,
        history: DraftTexts,
        seeds: DraftSeeds | None,
        end_token_ids: frozenset[int] | Callable[[int], frozenset[int]],
    ) -> Drafter | None:
        """What makes the blocks of a plan; None for none."""
        drafter: Drafter | None = None
        if plan.sampled and plan.heads:
            assert seeds is not None
            assert isinstance(plan.tree, Tree)
            drafter = DrawnDrafter(executor, plan.tree, history=history, seeds=seeds, end_token_ids=end_token_ids)
        elif plan.heads:
            if isinstance(plan.tree, DynamicTree):
                drafter = DynamicTreeDrafter(executor, plan.tree)
            elif plan.tree.is_chain:
                drafter = ChainDrafter(executor, plan.heads)
            else:
                drafter = (PathTreeDrafter if executor.drafts_in_turn else TreeDrafter)(executor, plan.tree)
        if plan.lookup:
            texts = [row[:length] for row, length in zip(prompts.ids_BP.tolist(), prompts.lengths, strict=True)]
            drafter = LookupDrafter(texts, count=plan.lookup, longest=options.lookup_ngram, beside=drafter)
        return drafter

    def _as_given(self, request: _Request, history_BT: Tensor) -> Tensor:
        """The prompts as the caller passed them, repeated as transformers repeats them for several samples each."""
        if request.given_BT is None:
            return history_BT
        return request.given_BT.repeat_interleave(history_BT.shape[0] // request.given_BT.shape[0], dim=0)


ENGINE = Engine()
register_engine(ENGINE)
