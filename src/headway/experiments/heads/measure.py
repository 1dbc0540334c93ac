"""What one trained model is worth: loss, acceptance, equal decoding, its untrained twin.

Legend: B rows, T positions, N future tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.data.loader import Batch, held_out_windows
from headway.data.token_cache import TokenCache
from headway.decoding.compare import compare_greedy
from headway.evaluation.acceptance import walk_acceptance
from headway.evaluation.first_block import first_block_acceptance
from headway.evaluation.head_caches import check_head_caches
from headway.evaluation.likelihood import evaluate_likelihood
from headway.evaluation.step_bytes import bytes_per_step
from headway.experiments.heads.options import HeadsScale
from headway.experiments.heads.start import weights_before_training
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.rng import preserved_rng, seed_everything

_ROWS_PER_FORWARD = 16
_CACHE_LIMIT = 1e-4
"""Largest relative difference of a right cache in float64: the norms of the families compute in float32."""

UNTRAINED = ("start", "copy")
"""Controls on the same trained base: the heads' own weights before the first step, and copies of the base's weights."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a comparison, the same for every model.

    Attributes:
        windows: rows of the training length, for likelihood and loop-free acceptance.
        block_prompts_BT: prompts for the first block after held-out text.
        prompts_BT: prompts that are decoded for longer.
    """

    windows: Batch
    block_prompts_BT: Tensor
    prompts_BT: Tensor

    @classmethod
    def of(cls, cache: TokenCache, scale: HeadsScale) -> HeldOut:
        """Cut the windows and prompts of a scale.

        Raises:
            DataError: too little held-out text.
        """
        length = int(scale.fields["sequence_length"])

        def prompts(tokens: int, count: int) -> Tensor:
            return held_out_windows(cache, sequence_length=tokens, max_windows=count).input_ids_BT

        return cls(
            windows=held_out_windows(cache, sequence_length=length, max_windows=scale.held_out_rows),
            block_prompts_BT=prompts(scale.block_prompt_tokens, scale.block_prompts),
            prompts_BT=prompts(scale.prompt_tokens, scale.prompts),
        )


def measure_model(folder: Path, config: TrainConfig, held_out: HeldOut, scale: HeadsScale) -> dict[str, Any]:
    """Every figure of one trained model that does not depend on the load of the machine, JSON-ready.

    Args:
        folder: the model.
        config: of the run that trained it.
        held_out: the text.
        scale: how much of everything.
    """
    model = MultiTokenLM.from_pretrained(folder).eval()
    drafts = model.num_future_tokens - 1
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reads_tokens": model.heads.autoregressive,
        "head_parameters": sum(parameter.numel() for parameter in model.heads.parameters()),
        "base_layers": len(model.family.layers),
        "held_out": _quality(model, held_out, acceptance=True),
        "lossless": _lossless(model, held_out.prompts_BT, new_tokens=scale.new_tokens),
        "bytes_per_step": {
            "plain": bytes_per_step(model, _context(held_out, scale), num_draft_tokens=0).to_json(),
            "drafted": bytes_per_step(model, _context(held_out, scale)).to_json(),
        },
    }
    if drafts:
        figures["untrained_heads"] = {kind: _untrained(folder, config, kind, held_out) for kind in UNTRAINED}
    check = check_head_caches(
        model.double(),
        held_out.windows.input_ids_BT[: scale.cache_texts],
        prompt_tokens=scale.cache_prompt_tokens,
        blocks=scale.cache_blocks,
    )
    figures["caches"] = check.to_json() | {"right": check.relative < _CACHE_LIMIT}
    return figures


def _context(held_out: HeldOut, scale: HeadsScale) -> Tensor:
    return held_out.windows.input_ids_BT[0, : scale.context_tokens]


def _quality(model: MultiTokenLM, held_out: HeldOut, *, acceptance: bool) -> dict[str, Any]:
    likelihood = evaluate_likelihood(model, held_out.windows.split(_ROWS_PER_FORWARD)).to_json()
    figures = {name: likelihood[name] for name in ("nats", "accuracy", "num_targets")}
    if acceptance:
        windows = held_out.windows
        figures["walk"] = walk_acceptance(
            model,
            windows.input_ids_BT,
            position_ids_BT=windows.position_ids_BT,
            document_ids_BT=windows.document_ids_BT,
            rows_per_forward=_ROWS_PER_FORWARD,
        ).to_json()
        figures["first_block"] = first_block_acceptance(model, held_out.block_prompts_BT).to_json()
    return figures


def _untrained(folder: Path, config: TrainConfig, kind: str, held_out: HeldOut) -> dict[str, Any]:
    """The trained base with heads of the same architecture that were never trained."""
    model = MultiTokenLM.from_pretrained(folder)
    changes_base = model.mtp_config.changes_base
    if kind == "start":
        model.heads.load_state_dict(weights_before_training(config).heads.state_dict())
    else:
        with preserved_rng():
            seed_everything(config.seed)  # what an architecture does not copy is drawn
            model = MultiTokenLM(
                model.base, replace(model.mtp_config, head_init="copy", allow_base_change=changes_base)
            )
    # Where heads are part of the next-token path, untrained ones break the next token too: a model that predicts one
    # token everywhere agrees with itself, and its acceptance means nothing.
    return _quality(model.eval(), held_out, acceptance=not changes_base)


def _lossless(model: MultiTokenLM, prompts_BT: Tensor, *, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding of the batch with drafts and without, token for token."""
    comparison = compare_greedy(
        model,
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return {
        "rows": len(comparison.first_difference),
        "identical_rows": sum(place is None for place in comparison.first_difference),
        "near_ties": comparison.near_ties,
        "identical_but_for_near_ties": comparison.identical_but_for_near_ties,
        "tokens": int(comparison.plain.num_new_tokens.sum()),
    }
