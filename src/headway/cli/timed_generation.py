"""One generation written to stdout while it comes, with its forward passes timed.

Imported only when a command generates: it needs torch.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.cli.live_text import LiveText, TextDecoder
from headway.cli.models import LoadedModel
from headway.decoding.blocks import BlockStream, stream_blocks
from headway.decoding.options import OPTION_NAMES, DecodingOptions, plan_drafts
from headway.decoding.statistics import GenerationResult


@dataclass(frozen=True)
class TimedGeneration:
    """One generation and how long its forwards took, writing not counted.

    Attributes:
        result: sequences and statistics.
        tokens: the new token ids.
        text: the new text; empty where it was not written.
        prefill_seconds: until the first token.
        seconds: in all, the prefill included.
        interrupted: Ctrl-C ended it.
    """

    result: GenerationResult
    tokens: list[int]
    text: str
    prefill_seconds: float
    seconds: float
    interrupted: bool

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all seconds."""
        return len(self.tokens) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """All figures, the text and its tokens."""
        return {
            "mode": self.result.mode,
            "note": self.result.note,
            "acceptance_rule": self.result.acceptance_rule,
            "lossless": self.result.lossless,
            "text": self.text,
            "token_ids": self.tokens,
            "new_tokens": len(self.tokens),
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_forward": self.result.acceptance.mean_acceptance_length,
            "acceptance": self.result.acceptance.to_dict(),
            "interrupted": self.interrupted,
        } | ({} if self.result.control is None else {"control": self.result.control.to_dict()})

    def summary(self) -> str:
        """One line for a person."""
        acceptance = self.result.acceptance
        ending = " (interrupted)" if self.interrupted else ""
        line = (
            f"{self.result.mode}: {len(self.tokens)} tokens in {self.seconds:.2f} s{ending}, "
            f"{self.tokens_per_second:.0f} tokens/s"
        )
        if int(acceptance.forwards[0]):
            line += f", {acceptance.mean_acceptance_length:.2f} tokens per forward"
        if self.result.control is not None:
            lengths = Counter(self.result.control.lengths[1:])
            line += "; drafts of " + ", ".join(f"{length}: {lengths[length]}" for length in sorted(lengths))
        return line


@dataclass(frozen=True)
class Session:
    """A loaded model, a prompt and how to continue it.

    Attributes:
        loaded: model and tokenizer.
        input_ids_1T: the prompt.
        arguments: for `generate`: limits, ends, sampling, drafts.
        show_blocks: mark in the text which forward pass gave what.
    """

    loaded: LoadedModel
    input_ids_1T: Tensor
    arguments: dict[str, Any]
    show_blocks: bool

    @property
    def max_new_tokens(self) -> int:
        """Limit of new tokens."""
        return int(self.arguments["max_new_tokens"])

    @property
    def copies(self) -> bool:
        """Whether drafts are copied from the text, which needs no heads."""
        return "lookup" in self.arguments.get("drafts", "heads")

    def deepest_draft(self, num_draft_tokens: int | str | None) -> int:
        """Tokens of the longest draft."""
        asked = {name: self.arguments[name] for name in OPTION_NAMES if name in self.arguments}
        options = DecodingOptions(**(asked | {"num_draft_tokens": num_draft_tokens}))
        return plan_drafts(options, self.loaded.model, do_sample=bool(self.arguments.get("do_sample"))).depth

    def run(
        self, num_draft_tokens: int | str | None, *, write: bool = True, max_new_tokens: int | None = None
    ) -> TimedGeneration:
        """Generate once.

        Args:
            num_draft_tokens: as in `MultiTokenLM.generate`.
            write: write the text to stdout as it comes.
            max_new_tokens: instead of the session's own limit.

        Raises:
            KeyboardInterrupt: Ctrl-C before the first token; later ones end the generation.
        """
        live = None
        if write:
            decoder = TextDecoder(self.loaded.tokenizer, self.input_ids_1T[0].tolist())
            live = LiveText(decoder, show_blocks=self.show_blocks)
        stream = self.stream(num_draft_tokens, max_new_tokens or self.max_new_tokens)
        tokens: list[int] = []
        seconds: list[float] = []
        interrupted = False
        try:
            while True:
                started = time.perf_counter()
                block = next(stream, None)
                if block is None:
                    break
                seconds.append(time.perf_counter() - started)
                tokens += block[0]
                if live is not None:
                    live.block(block[0])
        except KeyboardInterrupt:
            if not tokens:
                raise
            interrupted = True
        if live is not None:
            live.end()
        return TimedGeneration(
            result=stream.result,
            tokens=tokens,
            text="" if live is None else live.text,
            prefill_seconds=seconds[0],
            seconds=sum(seconds),
            interrupted=interrupted,
        )

    def stream(self, num_draft_tokens: int | str | None, max_new_tokens: int) -> BlockStream:
        """The forwards of one generation, to be run by whoever iterates."""
        model = self.loaded.model
        input_ids_1T = self.input_ids_1T.to(next(model.parameters()).device)
        return stream_blocks(
            model,
            input_ids_1T,
            attention_mask=torch.ones_like(input_ids_1T),
            num_draft_tokens=num_draft_tokens,
            **(self.arguments | {"max_new_tokens": max_new_tokens}),
        )
