"""Decoding speed, measured side by side: plain, self-speculative and Hugging Face `generate` in turns.

Timings of separate phases drift apart with the load of the machine, so the arms take turns (A B C A B C
...) prompt by prompt, and a speed-up is the ratio of two arms within one round; the report gives the median
round and the spread.

Every timing is the wall time of a whole call, prefill included, for all arms alike; tokens are counted as
token ids in the output (tokens cut by a limit or an end of text are not there to be counted).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

# Registers the engine that `MultiTokenLM.generate` delegates to.
import headway.decoding.engine  # noqa: F401
from headway.errors import ConfigError
from headway.evaluation.json_ready import json_ready
from headway.evaluation.offset_logits import evaluation_mode
from headway.model.multi_token_lm import MultiTokenLM

PLAIN = "plain"
SELF_SPECULATIVE = "self-speculative"
HUGGING_FACE = "hugging-face"


@dataclass(frozen=True)
class ArmSpeed:
    """Speed of one way to decode.

    Attributes:
        name: of the arm.
        tokens_per_second: median over rounds of (new tokens of all prompts) / (seconds of all prompts).
        rounds: that figure for every round.
        new_tokens: tokens generated per round, all prompts together.
        forwards: forward passes per round, the prefills among them.
    """

    name: str
    tokens_per_second: float
    rounds: tuple[float, ...]
    new_tokens: int
    forwards: int

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forward passes, the prefills and the tokens they gave among them."""
        return self.new_tokens / self.forwards


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster `fast` is than `slow`, paired within rounds: median, lowest and highest round."""

    fast: str
    slow: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class DecodingSpeed:
    """Speeds of all arms, measured interleaved.

    Attributes:
        arms: in the order in which they took turns.
        ratios: every pair (later arm over the earlier, and the plain arm over Hugging Face's).
        identical: whether all arms generated the same tokens for every prompt.
        prompts: number of prompts, decoded one at a time (batch 1).
        max_new_tokens: limit per prompt.
        repeats: rounds that were timed.
        warmup: rounds before them that were not.
        includes_prefill: True: the timings are of whole calls.
        threads: CPU threads of one operation.
        device: where it ran.
        dtype: of the weights.
    """

    arms: tuple[ArmSpeed, ...]
    ratios: tuple[SpeedRatio, ...]
    identical: bool
    prompts: int
    max_new_tokens: int
    repeats: int
    warmup: int
    includes_prefill: bool
    threads: int
    device: str
    dtype: str

    def arm(self, name: str) -> ArmSpeed:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def ratio(self, fast: str, slow: str) -> SpeedRatio:
        """The ratio of two arms."""
        return next(ratio for ratio in self.ratios if (ratio.fast, ratio.slow) == (fast, slow))

    @property
    def forward_cost(self) -> float:
        """Seconds of one self-speculative forward pass over those of a plain one, both as means over whole calls.

        The speed-up is tokens per forward over this; it says what any other acceptance would give (`speedup_at`).
        """
        per_forward = self.arm(SELF_SPECULATIVE).tokens_per_forward / self.arm(PLAIN).tokens_per_forward
        return per_forward / self.ratio(SELF_SPECULATIVE, PLAIN).median

    def speedup_at(self, mean_acceptance_length: float) -> float:
        """The speed-up over plain decoding on a text with that many tokens per forward pass.

        The measured speed-up is that of the texts that were generated; where those loop, it flatters.
        """
        return mean_acceptance_length / self.forward_cost

    def to_json(self) -> dict[str, Any]:
        """All fields and the cost of a forward pass; NaN becomes None."""
        return cast(dict[str, Any], json_ready(self)) | {"forward_cost": self.forward_cost}


@dataclass(frozen=True)
class Decoded:
    """One prompt [1, T] and its continuation [1, T + new], and the forward passes it took, the prefill among them."""

    sequence_1T: Tensor
    forwards: int


@dataclass(frozen=True)
class InterleavedRounds:
    """What arms that took turns did.

    Attributes:
        seconds: per arm and round, all prompts together.
        outputs: per arm and prompt the new tokens of the last round.
        forwards: per arm the forward passes of the last round.
    """

    seconds: dict[str, list[float]]
    outputs: dict[str, list[list[int]]]
    forwards: dict[str, int]


def measure_speed(
    model: MultiTokenLM,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    repeats: int = 5,
    warmup: int = 1,
    num_draft_tokens: int | None = None,
) -> DecodingSpeed:
    """Time plain and self-speculative decoding of one engine and Hugging Face `generate`, taking turns.

    All arms are greedy, decode one prompt at a time with the same weights, and stop at the same limit. The
    model's train/eval modes are as before the call.

    Args:
        model: the model to decode with; its `base` serves the Hugging Face arm.
        prompts: token ids [T] or [1, T] each, without padding.
        max_new_tokens: limit per prompt.
        repeats: timed rounds; medians and spreads are over them.
        warmup: rounds before them, untimed.
        num_draft_tokens: draft length of the self-speculative arm; the engine's default where None.

    Raises:
        ConfigError: no prompt, or repeats < 1, or warmup < 0.
    """
    if not prompts or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"a speed measurement needs at least one prompt and one repeat: got {len(prompts)} prompts, "
            f"repeats={repeats}, warmup={warmup}"
        )
    rows = [prompt.reshape(1, -1) for prompt in prompts]
    draft = {} if num_draft_tokens is None else {"num_draft_tokens": num_draft_tokens}

    def decode(row: Tensor, **options: Any) -> Decoded:
        result = model.generate(
            row, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options
        )
        if result.acceptance.interrupted:
            # The engine gives back what it has on Ctrl-C; half a text is no measurement.
            raise KeyboardInterrupt
        return Decoded(result.sequences, 1 + int(result.acceptance.forwards[0]))

    def decode_plain(row: Tensor) -> Decoded:
        return decode(row, num_draft_tokens=0)

    def decode_self_speculative(row: Tensor) -> Decoded:
        return decode(row, **draft)

    def decode_hugging_face(row: Tensor) -> Decoded:
        sequence_1T = model.base.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=max_new_tokens
        )
        return Decoded(sequence_1T, sequence_1T.shape[1] - row.shape[1])

    arms = {
        PLAIN: decode_plain,
        SELF_SPECULATIVE: decode_self_speculative,
        HUGGING_FACE: decode_hugging_face,
    }
    with evaluation_mode(model):
        if warmup:
            time_interleaved(arms, rows, repeats=warmup)
        timed = time_interleaved(arms, rows, repeats=repeats)
    parameter = next(model.parameters())
    return DecodingSpeed(
        arms=tuple(_arm_speed(name, timed) for name in arms),
        ratios=(
            _ratio(timed, SELF_SPECULATIVE, PLAIN),
            _ratio(timed, PLAIN, HUGGING_FACE),
            _ratio(timed, SELF_SPECULATIVE, HUGGING_FACE),
        ),
        identical=all(timed.outputs[name] == timed.outputs[PLAIN] for name in arms),
        prompts=len(rows),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        warmup=warmup,
        includes_prefill=True,
        threads=torch.get_num_threads(),
        device=str(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
    )


def time_interleaved(
    arms: Mapping[str, Callable[[Tensor], Decoded]], rows: Sequence[Tensor], *, repeats: int
) -> InterleavedRounds:
    """Call every arm on every row, the arms taking turns row by row, `repeats` times over.

    Args:
        arms: name to decoder; a decoder continues one prompt.
        rows: prompts [1, T].
        repeats: rounds.

    Returns:
        Seconds (work on an accelerator included), new tokens and forward passes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    outputs: dict[str, list[list[int]]] = {name: [] for name in arms}
    forwards = dict.fromkeys(arms, 0)
    for _ in range(repeats):
        spent = dict.fromkeys(arms, 0.0)
        outputs = {name: [] for name in arms}
        forwards = dict.fromkeys(arms, 0)
        for row in rows:
            for name, decode in arms.items():
                _wait_for(row)
                started = time.perf_counter()
                decoded = decode(row)
                _wait_for(row)
                spent[name] += time.perf_counter() - started
                outputs[name].append(decoded.sequence_1T[0, row.shape[1] :].tolist())
                forwards[name] += decoded.forwards
        for name in arms:
            seconds[name].append(spent[name])
    return InterleavedRounds(seconds, outputs, forwards)


def _wait_for(row: Tensor) -> None:
    if row.device.type == "cuda":
        torch.cuda.synchronize(row.device)


def _arm_speed(name: str, timed: InterleavedRounds) -> ArmSpeed:
    new_tokens = sum(len(output) for output in timed.outputs[name])
    rounds = tuple(new_tokens / seconds for seconds in timed.seconds[name])
    return ArmSpeed(name, statistics.median(rounds), rounds, new_tokens, timed.forwards[name])


def _ratio(timed: InterleavedRounds, fast: str, slow: str) -> SpeedRatio:
    fast_tokens, slow_tokens = (sum(map(len, timed.outputs[name])) for name in (fast, slow))
    # Per token, so that an arm whose text ended earlier gains nothing by it.
    ratios = [
        (slow_seconds / max(slow_tokens, 1)) / (fast_seconds / max(fast_tokens, 1))
        for fast_seconds, slow_seconds in zip(timed.seconds[fast], timed.seconds[slow], strict=True)
    ]
    return SpeedRatio(fast, slow, statistics.median(ratios), min(ratios), max(ratios))
