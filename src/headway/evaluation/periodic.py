"""Evaluations to run now and then while a model trains: likelihood, acceptance, and the real decoder.

Each evaluator is a callable (model, steps done) -> figures, as `headway.training.loop.train` takes them; a list has one
number per offset. They look at the same held-out text every time. On several processes each takes its share of the rows and
of the prompts, and all give the figures of all; each needs the whole model then, since they do not decode in step.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

import headway.decoding.engine  # noqa: F401 - registers itself as what MultiTokenLM.generate uses
from headway.data.loader import held_out_windows
from headway.data.token_cache import TokenCache
from headway.evaluation.acceptance import walk_acceptance
from headway.evaluation.json_ready import json_ready
from headway.evaluation.likelihood import evaluate_likelihood
from headway.model.multi_token_lm import MultiTokenLM
from headway.processes import current_processes

Evaluator = Callable[[MultiTokenLM, int], Mapping[str, Any]]

_ROWS_PER_FORWARD = 16


def held_out_evaluators(
    cache: TokenCache, *, sequence_length: int, rows: int, prompts: int, prompt_tokens: int, new_tokens: int
) -> list[Evaluator]:
    """Evaluators on held-out text.

    Args:
        cache: the held-out text.
        sequence_length: T of the rows.
        rows: at most so many rows for likelihood and loop-free acceptance.
        prompts: on how many prompts the decoder runs; 0 leaves it out.
        prompt_tokens: length of each prompt, less where the text is shorter.
        new_tokens: decoded after each.

    Returns:
        Evaluators whose figures are `nats`, `accuracy`, `bits_per_byte` (lists, offset 1 first),
        `walk_acceptance_length` (tokens per forward along the held-out text itself), `walk_acceptance_rate` (list, offset
        2 first: drafts accepted where all earlier ones were) and, with prompts,
        `decoded_acceptance_length` (tokens per forward of the real decoder, which loops can flatter) and
        `decoded_acceptance_rate` (list, offset 2 first).

    Raises:
        DataError: too little held-out text for one window.
    """
    windows = held_out_windows(cache, sequence_length=sequence_length, max_windows=rows)

    def likelihood(model: MultiTokenLM, step: int) -> dict[str, Any]:
        processes = current_processes()
        batch = windows.to(_device(model))
        figures = evaluate_likelihood(
            model,
            batch.rows(processes.share_of(len(batch))).split(_ROWS_PER_FORWARD),
            bytes_per_token=cache.bytes_per_token,
            processes=processes,
        )
        walk = walk_acceptance(
            model,
            batch.input_ids_BT,
            position_ids_BT=batch.position_ids_BT,
            document_ids_BT=batch.document_ids_BT,
            rows_per_forward=_ROWS_PER_FORWARD,
            processes=processes,
        )
        return _ready(
            nats=figures.nats,
            accuracy=figures.accuracy,
            bits_per_byte=figures.bits_per_byte,
            walk_acceptance_length=walk.mean_acceptance_length,
            walk_acceptance_rate=walk.acceptance_rate,
        )

    if prompts == 0:
        return [likelihood]
    prompts_BT = held_out_windows(cache, sequence_length=prompt_tokens, max_windows=prompts).input_ids_BT

    def decoding(model: MultiTokenLM, step: int) -> dict[str, Any]:
        processes = current_processes()
        ids_BT = prompts_BT[list(processes.share_of(len(prompts_BT)))].to(_device(model))
        offsets = model.num_future_tokens - 1
        counts = torch.zeros(2 + 2 * offsets, dtype=torch.long, device=ids_BT.device)
        if len(ids_BT):
            acceptance = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                # Each process has the whole model here and its own prompts; transformers would assume otherwise.
                synced_gpus=False,
            ).acceptance
            emitted, forwards = int(acceptance.emitted_tokens.sum()), int(acceptance.forwards.sum())
            counts += torch.tensor([emitted, forwards, *acceptance.drafted, *acceptance.accepted], device=ids_BT.device)
        emitted, forwards, *rest = processes.total(counts).tolist()
        return _ready(
            decoded_acceptance_length=emitted / forwards if forwards else math.nan,
            decoded_acceptance_rate=[
                accepted / drafted if drafted else math.nan
                for drafted, accepted in zip(rest[:offsets], rest[offsets:], strict=True)
            ],
        )

    return [likelihood, decoding]


def _ready(**figures: Any) -> dict[str, Any]:
    ready: dict[str, Any] = json_ready(figures)
    return ready


def _device(model: MultiTokenLM) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
