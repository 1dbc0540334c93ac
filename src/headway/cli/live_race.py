"""Two generations of one prompt, forward by forward in turns, drawn while they run.

Imported only by `headway race`: it needs torch and rich.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from headway.cli.live_text import TextDecoder
from headway.cli.timed_generation import Session
from headway.decoding.blocks import BlockStream
from headway.decoding.compare import NEAR_TIE_GAP, first_difference, top_two_gap
from headway.experiments.demo.blocks import printable
from headway.experiments.demo.side_by_side import BAR, BLOCK_STYLES, NARROW

SECONDS_BETWEEN_FRAMES = 0.05
WARM_UP_TOKENS = 8
FEWEST_ROUNDS, MOST_ROUNDS = 1, 7
SECONDS_OF_ROUNDS = 8.0


@dataclass
class Lane:
    """One generation on its own clock.

    Attributes:
        title: above its pane.
        stream: its forwards.
        decoder: of its text.
        seconds: that its forwards took, drawing and the other lane not counted.
        tokens: new token ids.
        pieces: text of every forward.
        finished: whether its text has ended.
    """

    title: str
    stream: BlockStream
    decoder: TextDecoder
    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: bool = False

    def step(self) -> None:
        """Run its next forward."""
        began = time.perf_counter()
        block = next(self.stream, None)
        self.seconds += time.perf_counter() - began
        if block is None:
            self.finished = True
            rest = self.decoder.feed([], final=True)
            if self.pieces:
                self.pieces[-1] += printable(rest)
            return
        self.tokens += block[0]
        self.pieces.append(printable(self.decoder.feed(block[0])))


@dataclass(frozen=True)
class Race:
    """How it ended.

    Attributes:
        plain: tokens of plain decoding.
        fast: tokens with drafts.
        tokens_per_forward: with drafts, the prefill not counted.
        plain_rounds: tokens per second of every undrawn round.
        fast_rounds: the same with drafts.
        first_difference: index of the first new token that differs, None where all are the same.
        logit_gap: between the two best tokens there.
    """

    plain: list[int]
    fast: list[int]
    tokens_per_forward: float
    plain_rounds: tuple[float, ...]
    fast_rounds: tuple[float, ...]
    first_difference: int | None
    logit_gap: float | None

    @property
    def identical(self) -> bool:
        """Whether not one token differs."""
        return self.first_difference is None

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return statistics.median(f / p for f, p in zip(self.fast_rounds, self.plain_rounds, strict=True))

    def verdict(self) -> str:
        """The last line for a person.

        >>> Race([1], [1], 2.0, (100.0,), (150.0,), None, None).verdict()
        'identical: yes, x1.50 (median of 1 round; 150 against 100 tokens/s, 2.00 tokens per forward)'
        """
        rounds = len(self.plain_rounds)
        line = (
            f"identical: {'yes' if self.identical else 'no'}, x{self.speedup:.2f} (median of {rounds} "
            f"round{'s' if rounds > 1 else ''}; {statistics.median(self.fast_rounds):.0f} against "
            f"{statistics.median(self.plain_rounds):.0f} tokens/s, {self.tokens_per_forward:.2f} tokens per forward)"
        )
        if self.first_difference is not None and self.logit_gap is not None:
            kind = "a near-tie, which rounding decides" if self.logit_gap < NEAR_TIE_GAP else "more than a near-tie"
            line += f"; they part at new token {self.first_difference + 1}, logit gap {self.logit_gap:.2g}: {kind}"
        return line

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "identical": self.identical,
            "first_difference": self.first_difference,
            "logit_gap": self.logit_gap,
            "speedup": self.speedup,
            "tokens_per_forward": self.tokens_per_forward,
            "new_tokens": len(self.plain),
            "plain_tokens_per_second_rounds": list(self.plain_rounds),
            "self_speculative_tokens_per_second_rounds": list(self.fast_rounds),
        }


def run_race(session: Session, console: Console, *, num_draft_tokens: int | None) -> Race:
    """Draw both generations while they run in turns, then time undrawn rounds.

    Args:
        session: model, prompt and limits; greedy.
        console: where it is drawn; without terminal or colours the two texts are printed once, with bars.
        num_draft_tokens: of the generation with drafts; None for one per head.
    """
    for drafts in (0, num_draft_tokens):  # what a first call costs belongs to neither
        session.run(drafts, write=False, max_new_tokens=min(WARM_UP_TOKENS, session.max_new_tokens))
    prompt = session.input_ids_1T[0].tolist()
    lanes = [
        Lane(title, session.stream(drafts, session.max_new_tokens), TextDecoder(session.loaded.tokenizer, prompt))
        for title, drafts in (("plain", 0), ("self-speculative", num_draft_tokens))
    ]
    coloured = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    if coloured:
        _watch(console, lanes)
    while any(not lane.finished for lane in lanes):
        _next_lane(lanes).step()
    console.print(panes(console, lanes, coloured=coloured, whole=True))
    race = _timed(session, lanes, num_draft_tokens)
    console.print(Text(race.verdict(), style="bold green" if race.identical else "bold red"))
    return race


def _watch(console: Console, lanes: list[Lane]) -> None:
    drawn = 0.0
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        while any(not lane.finished for lane in lanes):
            _next_lane(lanes).step()
            if time.perf_counter() - drawn > SECONDS_BETWEEN_FRAMES:
                live.update(panes(console, lanes, coloured=True, whole=False), refresh=True)
                drawn = time.perf_counter()


def _next_lane(lanes: list[Lane]) -> Lane:
    """The one that is behind on the common clock."""
    return min((lane for lane in lanes if not lane.finished), key=lambda lane: lane.seconds)


def _timed(session: Session, lanes: list[Lane], num_draft_tokens: int | None) -> Race:
    plain, fast = lanes
    rounds: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    while len(rounds[0]) < FEWEST_ROUNDS or (len(rounds[0]) < MOST_ROUNDS and spent < SECONDS_OF_ROUNDS):
        for drafts, figures in zip((0, num_draft_tokens), rounds, strict=True):
            again = session.run(drafts, write=False)
            if again.interrupted:
                raise KeyboardInterrupt
            figures.append(again.tokens_per_second)
            spent += again.seconds
    place = first_difference(fast.tokens, plain.tokens)
    gap = None
    if place is not None:
        gap = top_two_gap(session.loaded.model, [*session.input_ids_1T[0].tolist(), *plain.tokens[:place]])
    return Race(
        plain=plain.tokens,
        fast=fast.tokens,
        tokens_per_forward=fast.stream.result.acceptance.mean_acceptance_length,
        plain_rounds=tuple(rounds[0]),
        fast_rounds=tuple(rounds[1]),
        first_difference=place,
        logit_gap=gap,
    )


def panes(console: Console, lanes: list[Lane], *, coloured: bool, whole: bool) -> RenderableType:
    """The lanes beside each other, or one under the other where the console is narrow.

    Args:
        console: whose width and height count.
        lanes: what to show.
        coloured: colours for forward passes, else bars.
        whole: all of the texts, else of each the last lines that fit the screen.
    """
    narrow = console.width < NARROW
    columns = (console.width if narrow else console.width // 2) - 4
    room = max(3, (console.height - 1) // (2 if narrow else 1) - 2)
    both = []
    for lane in lanes:
        lines = _written(lane, coloured=coloured).wrap(console, max(10, columns))
        shown = lines if whole else lines[-room:]
        text = Text("\n", no_wrap=True, overflow="crop").join(shown)
        forwards = max(0, len(lane.pieces) - 1)
        subtitle = f"{len(lane.tokens)} tokens, prefill + {forwards} forward passes, {lane.seconds:.2f} s"
        border = ("cyan" if lane is lanes[-1] else "white") if coloured else "none"
        both.append(Panel(text, title=lane.title, subtitle=subtitle, border_style=border))
    if narrow:
        return Group(*both)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*both)
    return grid


def _written(lane: Lane, *, coloured: bool) -> Text:
    text = Text()
    for index, piece in enumerate(lane.pieces):
        if coloured:
            # A blank stands for the line feed, so that its forward pass can be seen.
            text.append(piece.replace("\n", " \n"), style=BLOCK_STYLES[index % len(BLOCK_STYLES)])
        else:
            text.append(BAR + piece)
    return text
