"""Speed of training and of decoding, every architecture taking turns with every other.

Apart from the trainings themselves, which ran one after the other for the better part of an hour on a machine whose load
drifts: here a round touches all of them within seconds, and a figure is the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.data.loader import PackedLoader
from headway.data.packing import Rows
from headway.evaluation.speed import Decoded, InterleavedRounds, time_interleaved
from headway.experiments.heads.start import weights_before_training
from headway.functional.repetition import distinct_ngrams
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.optimizers import TrainingOptimizer
from headway.training.step import optimizer_step

_WARM_UP_STEPS = 2


def training_speeds(configs: Mapping[str, TrainConfig], rows: Rows, *, repeats: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of whole optimizer steps (forward, backward, update) of each configuration, taking turns.

    Args:
        configs: name -> configuration; a fresh model is made of each.
        rows: training text.
        repeats: timed steps of each.
    """
    steps = {name: _stepper(config, rows) for name, config in configs.items()}
    for step in steps.values():
        for _ in range(_WARM_UP_STEPS):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: _rates([configs[name].tokens_per_step / second for second in times]) for name, times in seconds.items()
    }


def _stepper(config: TrainConfig, rows: Rows) -> Callable[[], None]:
    model = weights_before_training(config).train()
    optimizer = TrainingOptimizer(model, config)
    optimizer.set_learning_rate_factor(0.01)
    batch = PackedLoader(rows, batch_size=config.rows_per_step).batch(0)

    def step() -> None:
        outcome = optimizer_step(
            model,
            optimizer,
            list(batch.split(config.batch_size)),
            precision=config.precision,
            gradient_clip=config.gradient_clip,
        )
        assert outcome is not None, "nothing asks this step to stop"

    return step


def decoding_speeds(
    models: Mapping[str, MultiTokenLM], prompts_BT: Tensor, *, new_tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Tokens per second of plain and of self-speculative decoding of each model, at batch 1, taking turns.

    Texts differ between models, so tokens per forward on them do too; `forward_cost` does not depend on the text: seconds
    of a forward that verifies and drafts over those of a plain one.

    Args:
        models: name -> model in eval mode.
        prompts_BT: prompts, decoded one at a time.
        new_tokens: limit after each.
        repeats: timed rounds.
    """
    arms: dict[str, Callable[[Tensor], Decoded]] = {}
    for name, model in models.items():
        for drafts in (0, model.num_future_tokens - 1)[: 1 if model.num_future_tokens == 1 else 2]:
            arms[_arm(name, drafts=bool(drafts))] = partial(
                _decode, model, new_tokens=new_tokens, num_draft_tokens=drafts
            )
    rows = [prompts_BT[row : row + 1] for row in range(prompts_BT.shape[0])]
    time_interleaved(arms, rows[:1], repeats=1)
    timed = time_interleaved(arms, rows, repeats=repeats)
    return {name: _decoding_figures(name, timed, drafts=model.num_future_tokens > 1) for name, model in models.items()}


def _decode(model: MultiTokenLM, row_1T: Tensor, *, new_tokens: int, num_draft_tokens: int) -> Decoded:
    result = model.generate(
        row_1T,
        attention_mask=torch.ones_like(row_1T),
        do_sample=False,
        max_new_tokens=new_tokens,
        num_draft_tokens=num_draft_tokens,
        return_dict_in_generate=True,
    )
    if result.acceptance.interrupted:
        # The engine gives back what it has on Ctrl-C; half a text is no measurement.
        raise KeyboardInterrupt
    return Decoded(result.sequences, 1 + int(result.acceptance.forwards[0]))


def _arm(name: str, *, drafts: bool) -> str:
    return f"{name} {'self-speculative' if drafts else 'plain'}"


def _decoding_figures(name: str, timed: InterleavedRounds, *, drafts: bool) -> dict[str, Any]:
    plain = _arm(name, drafts=False)
    outputs = timed.outputs[plain]
    tokens = sum(map(len, outputs))
    plain_rates = [tokens / seconds for seconds in timed.seconds[plain]]
    figures: dict[str, Any] = {
        "plain": _rates(plain_rates),
        "tokens": tokens,
        "distinct_8grams": distinct_ngrams(outputs, size=8),
    }
    if drafts:
        fast = _arm(name, drafts=True)
        fast_rates = [tokens / seconds for seconds in timed.seconds[fast]]
        speedup = statistics.median(mine / theirs for mine, theirs in zip(fast_rates, plain_rates, strict=True))
        per_forward = tokens / timed.forwards[fast]
        figures |= {
            "self_speculative": _rates(fast_rates),
            "identical": timed.outputs[fast] == outputs,
            "speedup": speedup,
            "tokens_per_forward": per_forward,
            "forward_cost": per_forward / (tokens / timed.forwards[plain]) / speedup,
        }
    return figures


def _rates(rounds: list[float]) -> dict[str, Any]:
    return {"tokens_per_second": statistics.median(rounds), "rounds": rounds}
