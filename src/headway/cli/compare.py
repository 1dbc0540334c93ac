"""Plain and self-speculative decoding of one prompt, for `headway generate --compare`.

Imported only when a command compares: it needs torch.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from headway.cli.console import note
from headway.cli.timed_generation import Session, TimedGeneration
from headway.decoding.compare import explain_differences, first_difference, top_two_gap
from headway.decoding.near_tie import Difference

WARM_UP_TOKENS = 8
MOST_ROUNDS = 5
SECONDS_OF_ROUNDS = 10.0


@dataclass(frozen=True)
class Comparison:
    """Both generations of one prompt, and their speed over several rounds.

    Attributes:
        plain: one token per forward.
        fast: with drafts.
        plain_rounds: tokens per second of every plain round, the written one first.
        fast_rounds: the same with drafts.
        first_difference: index of the first new token that differs, None where all are the same.
        logit_gap: between the two best tokens there.
        report: what both ways said there, from a repetition; None where nothing differs or the repetition does not.
    """

    plain: TimedGeneration
    fast: TimedGeneration
    plain_rounds: tuple[float, ...]
    fast_rounds: tuple[float, ...]
    first_difference: int | None
    logit_gap: float | None
    report: Difference | None = None

    @property
    def speedup(self) -> float:
        """Median over rounds of how many times as fast drafting is."""
        pairs = zip(self.fast_rounds, self.plain_rounds, strict=True)
        return statistics.median(fast / plain for fast, plain in pairs)

    def to_json(self) -> dict[str, Any]:
        """All figures; tokens per second are medians over the rounds."""
        return {
            "identical": self.first_difference is None,
            "first_difference": self.first_difference,
            "logit_gap": self.logit_gap,
            "report": None if self.report is None else self.report.to_json(),
            "speedup": self.speedup,
            "plain": _arm(self.plain, self.plain_rounds),
            "self_speculative": _arm(self.fast, self.fast_rounds),
        }

    def lines(self) -> list[str]:
        """The verdict for a person."""
        place, gap, rounds = self.first_difference, self.logit_gap, len(self.plain_rounds)
        per_forward = [generation.result.acceptance.mean_acceptance_length for generation in (self.plain, self.fast)]
        per_second = [statistics.median(figures) for figures in (self.plain_rounds, self.fast_rounds)]
        lines = [
            f"identical: {'yes' if place is None else 'no'}",
            f"tokens per forward: {per_forward[0]:.2f} plain, {per_forward[1]:.2f} self-speculative",
            f"tokens/s: {per_second[0]:.0f} plain, {per_second[1]:.0f} self-speculative, {self.speedup:.2f} times as "
            f"fast (median of {rounds} round{'s' if rounds > 1 else ''})",
        ]
        if place is not None and gap is not None:
            said = "not explained: it did not come again" if self.report is None else self.report.sentence()
            lines.insert(1, f"first difference at new token {place + 1}, where the two best logits are {gap:.2g} apart")
            lines.insert(2, said)
        return lines


def compare_decoding(session: Session, num_draft_tokens: int | str | None) -> Comparison:
    """Write both generations, then time further rounds of both in turns.

    The rounds take turns because the load of a machine drifts. The report gives the median of at most 5 rounds, which
    take at most 10 seconds after the first.

    Args:
        session: what to continue.
        num_draft_tokens: of the generation with drafts; None for one per head.

    Raises:
        KeyboardInterrupt: Ctrl-C; half a generation would count as a difference.
    """
    warm_up = min(WARM_UP_TOKENS, session.max_new_tokens)
    for drafts in (0, num_draft_tokens):  # what a first call costs belongs to neither
        _whole(session.run(drafts, write=False, max_new_tokens=warm_up))
    drafted = session.deepest_draft(num_draft_tokens)
    note("plain decoding, one token per forward:")
    plain = _whole(session.run(0))
    note(f"self-speculative decoding, up to {drafted + 1} tokens per forward:")
    fast = _whole(session.run(num_draft_tokens))
    plain_rounds, fast_rounds = [plain.tokens_per_second], [fast.tokens_per_second]
    spent, round_seconds = 0.0, plain.seconds + fast.seconds
    while len(plain_rounds) < MOST_ROUNDS and spent + round_seconds <= SECONDS_OF_ROUNDS:
        again = [_whole(session.run(drafts, write=False)) for drafts in (0, num_draft_tokens)]
        plain_rounds.append(again[0].tokens_per_second)
        fast_rounds.append(again[1].tokens_per_second)
        spent += sum(generation.seconds for generation in again)
    place = first_difference(fast.tokens, plain.tokens)
    gap, report = None, None
    if place is not None:
        gap = top_two_gap(session.loaded.model, [*session.input_ids_1T[0].tolist(), *plain.tokens[:place]])
        report = _report(session, num_draft_tokens, place)
    return Comparison(plain, fast, tuple(plain_rounds), tuple(fast_rounds), place, gap, report)


def _report(session: Session, num_draft_tokens: int | str | None, place: int) -> Difference | None:
    """What both ways say where they part, if they part there again."""
    model = session.loaded.model
    input_ids_1T = session.input_ids_1T.to(next(model.parameters()).device)
    found = explain_differences(
        model,
        input_ids_1T,
        attention_mask=torch.ones_like(input_ids_1T),
        num_draft_tokens=num_draft_tokens,
        **session.arguments,
    )
    return next((report for report in found if report.position == place), None)


def _whole(generation: TimedGeneration) -> TimedGeneration:
    if generation.interrupted:
        raise KeyboardInterrupt
    return generation


def _arm(generation: TimedGeneration, rounds: tuple[float, ...]) -> dict[str, Any]:
    return generation.to_json() | {
        "tokens_per_second": statistics.median(rounds),
        "tokens_per_second_rounds": list(rounds),
    }
