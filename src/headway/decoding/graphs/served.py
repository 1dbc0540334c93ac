"""Which requests the graph executor serves, and with what; others are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headway.decoding.graphs.capture import settings_for
from headway.decoding.graphs.emission import GreedyChoice, SampledChoice
from headway.decoding.graphs.executor import GraphExecutor
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.model import LeanModel
from headway.decoding.options import DecodingOptions, DraftPlan
from headway.decoding.prompts import Prompts
from headway.decoding.scored import RowSeeds
from headway.errors import DecodingError
from headway.functional.tree import Tree

WARPERS = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Processors that are functions of the scores alone, made of operations that a graph can hold (transformers 5.23)."""


def graph_executor(
    model: Any,
    prompts: Prompts,
    options: DecodingOptions,
    plan: DraftPlan,
    *,
    max_new_tokens: int,
    processors: Sequence[Any],
    end_token_ids: frozenset[int],
    seeds: RowSeeds | None,
    matches: bool,
    plain_limits: bool,
    records: bool,
) -> GraphExecutor:
    """The executor of a request.

    Args:
        model: a `MultiTokenLM`.
        prompts: the batch.
        options: of the request.
        plan: of its drafts.
        max_new_tokens: the most tokens a row can get.
        processors: transformers' list.
        end_token_ids: tokens that end a text.
        seeds: of the draws; None for temperature 0.
        matches: whether a draft stands if it is the model's own choice.
        plain_limits: whether nothing but end tokens and a length ends a text.
        records: whether scores or logits are wanted.

    Raises:
        DecodingError: no CUDA device, a model without lean layers, a request that a captured step does not serve, or a
            cache that does not fit.
    """
    settings_for(model.get_input_embeddings().weight.device)
    names = sorted({type(item).__name__ for item in processors if seeds is None or type(item) not in WARPERS})
    unserved = {
        "candidate trees (tree)": not (isinstance(plan.tree, Tree) and plan.tree.is_chain),
        f"copied drafts (drafts={options.drafts!r})": bool(plan.lookup),
        "drawn drafts (sample_drafts=True)": plan.sampled,
        "drafts from a part of the vocabulary (draft_vocabulary)": options.draft_vocabulary is not None,
        "draft lengths that follow the costs (num_draft_tokens='auto')": plan.controlled,
        f"acceptance={options.acceptance!r}": not (matches or plan.sampled),
        "stop strings and other criteria": not plain_limits,
        "output_scores and output_logits": records,
        f"the processors {', '.join(names)}": bool(names),
    }
    asked = [what for what, is_asked in unserved.items() if is_asked]
    if asked:
        raise DecodingError(
            f"executor='graph' runs chains of the heads' drafts, greedy or with temperature, top-k, top-p and min-p, and not "
            f"{'; '.join(asked)}: pass executor='lean' for it"
        )
    lean = lean_model(model)
    if not isinstance(lean, LeanModel):
        raise DecodingError(f"executor='graph' captures lean layers, and there are none: {lean}; pass executor='eager'")
    uniforms = None
    if seeds is not None:
        rows = [seeds.draws(row, 0) for row in range(prompts.batch)]
        uniforms = [[draws.uniform(depth) for depth in range(max_new_tokens + plan.heads)] for draws in rows]
    return GraphExecutor(
        lean,
        prompts,
        max_new_tokens=max_new_tokens,
        num_draft_tokens=plan.heads,
        choice=GreedyChoice() if seeds is None else SampledChoice(processors),
        end_token_ids=end_token_ids,
        uniforms=uniforms,
        prefill_chunk_tokens=options.prefill_chunk_tokens,
    )
