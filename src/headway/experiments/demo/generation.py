"""One prompt decoded both ways, with the moment at which every forward pass gave its tokens.

Legend: T positions of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

# Registers the engine that `MultiTokenLM.generate` delegates to.
import headway.decoding.engine  # noqa: F401
from headway.evaluation.acceptance import WalkAcceptance, summarize_blocks
from headway.evaluation.offset_logits import evaluation_mode
from headway.functional.repetition import distinct_ngrams
from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt from held-out text: its bytes as token ids, and the document they come from."""

    source: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class RecordedGeneration:
    """What one generation gave, forward pass by forward pass.

    Attributes:
        tokens: new token ids.
        lengths: tokens emitted per forward pass; item 0 is the prefill and its one token.
        moments: seconds from the call to each forward's tokens; one per item of `lengths`.
        seconds: of the whole call.
        forwards: forward passes after the prefill (the denominator of tokens per forward).
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    moments: tuple[float, ...]
    seconds: float
    forwards: int

    @property
    def tokens_per_forward(self) -> float:
        """Tokens emitted per forward pass, the prefill and its token not counted."""
        return (len(self.tokens) - self.lengths[0]) / self.forwards if self.forwards else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over the whole call, prefill included."""
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded plainly and self-speculatively."""

    prompt: DemoPrompt
    plain: RecordedGeneration
    self_speculative: RecordedGeneration

    @property
    def identical(self) -> bool:
        """Whether not one token differs."""
        return self.plain.tokens == self.self_speculative.tokens


@dataclass(frozen=True)
class GeneratedAcceptance:
    """Acceptance on generated text, over all prompts.

    Attributes:
        tokens_per_forward: new tokens over forward passes, the prefill and its token not counted.
        blocks: acceptance of all blocks but each generation's last, which a limit may have cut.
        distinct_8grams: share of distinct 8-grams in the generated text; near 0 the text loops.
    """

    tokens_per_forward: float
    blocks: WalkAcceptance
    distinct_8grams: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mean_acceptance_length": self.tokens_per_forward,
            "acceptance_rate": self.blocks.to_json()["acceptance_rate"],
            "distinct_8grams": self.distinct_8grams,
        }


class _Stopwatch(BaseStreamer):  # type: ignore[misc]
    """A streamer that notes how many tokens had arrived when."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.arrivals: list[tuple[float, int]] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Note the tokens; the first call brings the prompt."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        total = (self.arrivals[-1][1] if self.arrivals else 0) + int(value.numel())
        self.arrivals.append((time.perf_counter() - self.started, total))

    def end(self) -> None:
        """Nothing is held back, so there is nothing to do."""

    def moment(self, num_tokens: int) -> float:
        """Seconds until at least `num_tokens` had arrived."""
        return next(moment for moment, total in self.arrivals if total >= num_tokens)


def record_generation(
    model: MultiTokenLM, prompt: DemoPrompt, *, max_new_tokens: int, num_draft_tokens: int | None
) -> RecordedGeneration:
    """Decode greedily and note when each forward pass gave its tokens.

    Args:
        model: decoded with in eval mode.
        prompt: what to continue.
        max_new_tokens: limit of new tokens.
        num_draft_tokens: 0 decodes plainly; None drafts as many as the engine's default.
    """
    row_1T = torch.tensor([prompt.tokens], device=next(model.parameters()).device)
    draft = {} if num_draft_tokens is None else {"num_draft_tokens": num_draft_tokens}
    watch = _Stopwatch()
    with evaluation_mode(model):
        result = model.generate(
            row_1T,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            streamer=watch,
            **draft,
        )
    seconds = time.perf_counter() - watch.started
    if result.acceptance.interrupted:
        # The engine gives back what it has on Ctrl-C; half a text is no comparison.
        raise KeyboardInterrupt
    tokens = tuple(result.sequences[0, row_1T.shape[1] :].tolist())
    after_prefill = tuple(length for length in result.acceptance.lengths[0] if length)
    lengths = (len(tokens) - sum(after_prefill), *after_prefill)
    moments, emitted = [], 0
    for length in lengths:
        emitted += length
        moments.append(watch.moment(emitted))
    return RecordedGeneration(tokens, lengths, tuple(moments), seconds, int(result.acceptance.forwards[0]))


def compare_prompt(model: MultiTokenLM, prompt: DemoPrompt, *, max_new_tokens: int) -> Comparison:
    """Decode one prompt plainly, then self-speculatively, with the same engine and weights."""
    return Comparison(
        prompt=prompt,
        plain=record_generation(model, prompt, max_new_tokens=max_new_tokens, num_draft_tokens=0),
        self_speculative=record_generation(model, prompt, max_new_tokens=max_new_tokens, num_draft_tokens=None),
    )


def generated_acceptance(comparisons: Sequence[Comparison], *, num_draft_tokens: int) -> GeneratedAcceptance:
    """Acceptance of the self-speculative generations, pooled over prompts.

    Args:
        comparisons: at least one.
        num_draft_tokens: drafts per forward pass.
    """
    generations = [comparison.self_speculative for comparison in comparisons]
    forwards = sum(generation.forwards for generation in generations)
    emitted = sum(len(generation.tokens) - generation.lengths[0] for generation in generations)
    whole_blocks = [length for generation in generations for length in generation.lengths[1:-1]]
    return GeneratedAcceptance(
        tokens_per_forward=emitted / forwards if forwards else float("nan"),
        blocks=summarize_blocks(whole_blocks, num_draft_tokens=num_draft_tokens),
        distinct_8grams=distinct_ngrams([generation.tokens for generation in generations], size=8),
    )
