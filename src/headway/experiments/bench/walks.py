"""Acceptance along the prompts' own text, which the model did not write: of chains, trees and copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.decoding.options import DecodingOptions, DraftPlan, plan_drafts
from headway.evaluation.acceptance import WalkAcceptance, summarize_blocks, walk_acceptance
from headway.evaluation.text_walk import WalkedText, can_walk, head_ranks, read_text, walk_texts
from headway.experiments.bench.generation import Arm
from headway.functional.tree import Tree
from headway.model.multi_token_lm import MultiTokenLM


def chain_walks(model: MultiTokenLM, texts: Sequence[Sequence[int]]) -> list[WalkAcceptance]:
    """Of chains of each length.

    Heads that read their own drafts are told the text's tokens instead, which is an easier task; all others have the task that
    they have in decoding.
    """
    device = next(model.parameters()).device
    readable = can_walk(model) and model.num_future_tokens > 1
    read = [read_text(model, text, num_candidates=1) for text in texts] if readable else []
    walks = []
    for drafts in range(1, model.num_future_tokens):
        lengths: list[int] = []
        if readable:
            lengths += walk_texts(read, Tree.chain(drafts)).lengths
        else:
            for text in texts:
                walk = walk_acceptance(model, torch.tensor([list(text)], device=device), num_draft_tokens=drafts)
                lengths += [length for length, count in enumerate(walk.length_counts, start=1) for _ in range(count)]
        walks.append(summarize_blocks(lengths, num_draft_tokens=drafts, num_future_tokens=model.num_future_tokens))
    return walks


def arm_walks(model: MultiTokenLM, arms: Sequence[Arm], texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Tokens per forward of every arm of ours whose drafts have one shape, by the arm's name.

    Left out are the controller and dynamic trees, whose shape follows what they see, and heads that read their own drafts.
    """
    if not can_walk(model):
        return {}
    plans = {arm.name: plan for arm in arms if (plan := _plan(model, arm)) is not None}
    candidates = max((head_ranks(plan.tree) for plan in plans.values() if isinstance(plan.tree, Tree)), default=1)
    read: list[WalkedText] = [read_text(model, text, num_candidates=candidates) for text in texts]
    return {
        name: walk_texts(read, plan.tree, lookup=plan.lookup).tokens_per_forward
        for name, plan in plans.items()
        if isinstance(plan.tree, Tree)
    }


def _plan(model: MultiTokenLM, arm: Arm) -> DraftPlan | None:
    if arm.engine != "headway" or arm.plain or arm.heads is None:
        return None
    return plan_drafts(DecodingOptions(**arm.arguments), model, do_sample=False)
