"""What every arm takes and gives, whatever engine is behind it.

Legend: B rows, T positions of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

EngineName = Literal["headway", "transformers", "llama.cpp"]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are decoded together, padded on the left where their lengths differ.

    Attributes:
        ids_BT: token ids.
        mask_BT: 1 for tokens, 0 for padding.
    """

    ids_BT: Tensor
    mask_BT: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return int(self.ids_BT.shape[0])

    def prompt(self, row: int) -> list[int]:
        """A row's tokens without padding."""
        tokens: list[int] = self.ids_BT[row][self.mask_BT[row].bool()].tolist()
        return tokens


@dataclass(frozen=True)
class Generation:
    """What one call gave.

    Attributes:
        tokens: per row the new token ids, none after an end of text.
        first: tokens per row that the prefill gave.
        forwards: forwards of the batch after the prefill.
        lengths: per row the tokens of each forward after the prefill; empty where the engine does not tell.
        drafted: per offset the drafts that were checked.
        accepted: those of them that stood.
        note: what the engine says about how it decoded.
    """

    tokens: list[list[int]]
    first: int
    forwards: int
    lengths: list[list[int]] = field(default_factory=list)
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    note: str | None = None

    @property
    def later_tokens(self) -> int:
        """Tokens that came after the prefill."""
        return sum(max(0, len(row) - self.first) for row in self.tokens)


Decode = Callable[[PromptBatch, Callable[[], None]], Generation]
"""Continue a batch; call the second argument once, when the prefill has given its tokens."""


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    Attributes:
        name: shown everywhere; an executor other than eager follows a slash.
        engine: whose loop runs.
        executor: of this project's engine; None for other engines.
        plain: whether it gives one token per forward.
        decode: does it, greedily.
        arguments: of `generate`, for this project's engine.
        heads: heads that draft, for the bytes of a step; None where they change from step to step.
        one_row: whether it takes one row at a time only.
        other_weights: whether it reads weights of its own, which may be of another precision: its text may differ.
        other_model: whether these are quantized: another model, which no speed-up is measured against whatever its text.
    """

    name: str
    engine: EngineName
    executor: str | None
    plain: bool
    decode: Decode
    arguments: dict[str, Any] = field(default_factory=dict)
    heads: int | None = 0
    one_row: bool = False
    other_weights: bool = False
    other_model: bool = False


@dataclass(frozen=True)
class Skipped:
    """An arm that was asked for and not measured.

    Attributes:
        arm: its name.
        reason: in words.
        batch: the batch that it was skipped at; None for all.
    """

    arm: str
    reason: str
    batch: int | None = None


@dataclass(frozen=True)
class Limits:
    """Where every arm stops, and whether it draws its tokens.

    Attributes:
        max_new_tokens: per row.
        end_token_ids: of the end of text; empty for none.
        pad_token_id: fills what is behind it.
        temperature: at which tokens are drawn, from the whole vocabulary; None for greedy texts.
        seed: of drawn texts.
    """

    max_new_tokens: int
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Of `generate`, ours and Hugging Face's."""
        ends = {"eos_token_id": list(self.end_token_ids)} if self.end_token_ids else {}
        limits = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.pad_token_id, **ends}
        if self.temperature is None:
            return limits | {"do_sample": False}
        return limits | {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}

    def own_arguments(self) -> dict[str, Any]:
        """Of this project's `generate`, in which one seed gives one text, with and without drafts."""
        return self.arguments() | ({} if self.temperature is None else {"seed": self.seed})
