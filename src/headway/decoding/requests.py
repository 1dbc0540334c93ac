"""What a scheduler is asked for, and what it answers: one text with its own limits, sampling and ends.

Legend: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from headway.decoding.statistics import AcceptanceStatistics
from headway.errors import DecodingError

FinishReason = Literal["stop", "length", "cancelled", "error"]
StoppedBy = Literal["end_token", "stop_sequence", "criterion"]

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(ids [1, T], scores [1, V]) -> scores [1, V], as transformers' processors; must depend on nothing but its arguments."""

StoppingCriterion = Callable[[Tensor, Any], Tensor]
"""(ids [1, T], None) -> bool [1], as transformers' criteria: whether the text ends here."""


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Equal to `model.generate(prompt, max_new_tokens=..., temperature=..., seed=..., ...)` on this prompt alone.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most tokens to generate, at least 1.
        temperature: 0 takes the most likely token each time; above it tokens are drawn.
        top_k: draw from so many most likely tokens; 0 for all.
        top_p: draw from the most likely tokens that together have this probability; 1 for all.
        min_p: draw from tokens at least so many times as likely as the most likely one; None for all.
        seed: of the draws; None takes one from torch's global generator.
        end_token_ids: tokens that end the text, kept as its last; None for those of the model's generation configuration.
        stop_sequences: token sequences that end the text once they stand in its new part, kept.
        stop_strings: the same for strings; the scheduler needs a tokenizer for them. A token that reaches beyond the string
            ends the text too, as in `generate`.
        logits_processors: applied in order before temperature, top-k, top-p and min-p.
        stopping_criteria: asked after every new token.

    Raises:
        DecodingError: a value that cannot be served.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    seed: int | None = None
    end_token_ids: Sequence[int] | None = None
    stop_sequences: Sequence[Sequence[int]] = ()
    stop_strings: Sequence[str] = ()
    logits_processors: Sequence[LogitsProcessor] = field(default=(), compare=False)
    stopping_criteria: Sequence[StoppingCriterion] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise DecodingError("a prompt needs at least one token: got none; start an empty text with the bos token")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise DecodingError(
                f"max_new_tokens must be a whole number of at least 1: got {self.max_new_tokens!r}; pass how many tokens to "
                f"generate"
            )
        for name, right, what in (
            ("temperature", self.temperature >= 0, "at least 0 (0 takes the most likely tokens)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 for all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in 0..1, or None"),
            ("stop_sequences", all(map(len, self.stop_sequences)), "sequences of at least one token"),
            ("stop_strings", not isinstance(self.stop_strings, str) and all(self.stop_strings), "a list of texts"),
        ):
            if not right:
                raise DecodingError(f"{name} must be {what}: got {getattr(self, name)!r}")

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    Attributes:
        id: of the request.
        tokens: the new ones.
        finish_reason: "stop" (an end token, a stop sequence or string, a criterion), "length", "cancelled", or "error".
        stopped_by: what ended the text where `finish_reason` is "stop".
        error: what went wrong where it is "error".
        acceptance: how far each of its forwards got.
        prompt_tokens: length of the prompt.
        seed: of the draws, also where the request named none; None where nothing was drawn.
        queued_seconds: from its submission until its prompt began to be read.
        first_token_seconds: from its submission to its first token; NaN where it got none.
        seconds: from its submission to its end.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason
    stopped_by: StoppedBy | None
    error: Exception | None
    acceptance: AcceptanceStatistics
    prompt_tokens: int
    seed: int | None
    queued_seconds: float
    first_token_seconds: float
    seconds: float
