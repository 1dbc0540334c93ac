"""Two generations typed side by side, each token coloured by the forward pass that gave it.

The generations have happened already; their recorded moments are replayed on one clock, slowed or hastened
by one common factor (which is printed), so that the two panes keep the pace at which they really ran. Where
there is no terminal or no colour, the same text is printed once, with a bar between forward passes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from headway.experiments.demo.blocks import plain_text, printable, text_blocks
from headway.experiments.demo.generation import Comparison, RecordedGeneration

BLOCK_STYLES = ("black on #8ecae6", "black on #ffd166", "black on #a8d672", "black on #f4a7b9")
"""Neighbouring forward passes never share one; all read well on dark and on light terminals."""

BAR = "\u2502"
NARROW = 100
"""Columns below which the panes stand one under the other."""

FRAMES_PER_SECOND = 20


def show_comparisons(console: Console, comparisons: Sequence[Comparison], *, seconds: float) -> None:
    """Replay every comparison on the console and end each with whether the texts are identical.

    Args:
        console: where it is shown; a console without terminal or colour gets the text at once, with bars.
        comparisons: recorded generations.
        seconds: length of the whole replay, all prompts together.
    """
    animated = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    slowdown = replay_slowdown(comparisons, seconds=seconds)
    if animated:
        note = f"replayed {describe_slowdown(slowdown)}; one colour = one forward pass"
        console.print(Text(note, style="dim"), highlight=False)
    else:
        console.print(f"one forward pass ends at every {BAR}", highlight=False)
    for number, comparison in enumerate(comparisons, start=1):
        console.print()
        console.print(
            Text(f"prompt {number} of {len(comparisons)}: {printable(comparison.prompt.source)}", style="bold"),
            highlight=False,
        )
        if animated:
            _replay(console, comparison, slowdown=slowdown)
        console.print(panes(console, comparison, coloured=animated))
        console.print(verdict_line([comparison]), highlight=False)


def replay_slowdown(comparisons: Sequence[Comparison], *, seconds: float) -> float:
    """Seconds of replay per second of generation, such that all replays together last `seconds`."""
    real = sum(max(c.plain.seconds, c.self_speculative.seconds) for c in comparisons)
    return seconds / real if real > 0 else 1.0


def describe_slowdown(slowdown: float) -> str:
    """The factor in words.

    >>> describe_slowdown(5.96), describe_slowdown(0.25), describe_slowdown(1.01)
    ('6.0 times slower than it ran', '4.0 times faster than it ran', 'as fast as it ran')
    """
    if 0.95 < slowdown < 1.05:
        return "as fast as it ran"
    factor, word = (slowdown, "slower") if slowdown > 1 else (1 / slowdown, "faster")
    return f"{factor:.1f} times {word} than it ran"


def verdict_line(comparisons: Sequence[Comparison]) -> Text:
    """`identical: yes`, tokens per forward and the tokens per second of both, over the comparisons given."""
    identical = all(comparison.identical for comparison in comparisons)
    plain, fast = [c.plain for c in comparisons], [c.self_speculative for c in comparisons]
    return Text.assemble(
        "identical: ",
        ("yes", "bold green") if identical else ("no", "bold red"),
        f"   tokens per forward: {_pooled_per_forward(fast):.2f} (plain {_pooled_per_forward(plain):.2f})"
        f"   tokens/s: {_pooled_per_second(fast):.0f} (plain {_pooled_per_second(plain):.0f})",
    )


def panes(console: Console, comparison: Comparison, *, coloured: bool, elapsed: float | None = None) -> RenderableType:
    """The two generations beside each other, or one under the other where the console is narrow.

    Args:
        console: whose width and height count.
        comparison: what to show.
        coloured: colours for forward passes, else bars.
        elapsed: seconds of generation to show, of each pane the last lines that fit the screen; all of it where None.
    """
    both = [
        _pane(console, title, comparison, generation, coloured=coloured, elapsed=elapsed)
        for title, generation in (
            ("plain decoding", comparison.plain),
            ("self-speculative decoding", comparison.self_speculative),
        )
    ]
    if console.width < NARROW:
        return Group(*both)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*both)
    return grid


def _pane(
    console: Console,
    title: str,
    comparison: Comparison,
    generation: RecordedGeneration,
    *,
    coloured: bool,
    elapsed: float | None,
) -> Panel:
    shown = len(generation.lengths) if elapsed is None else bisect_right(generation.moments, elapsed)
    columns = (console.width if console.width < NARROW else console.width // 2) - 4
    lines = _fold(_written(comparison, generation, shown=shown, coloured=coloured), columns)
    height = None
    if elapsed is not None:
        whole = _written(comparison, generation, shown=len(generation.lengths), coloured=coloured)
        room = (console.height - 1) // (2 if console.width < NARROW else 1) - 2
        # The frame has its last height from the start: it neither grows while it types nor outgrows the screen.
        height = 2 + max(1, min(len(_fold(whole, columns)), room))
        lines = lines[2 - height :]
    text = Text("\n", no_wrap=True).join(lines)
    seconds = generation.seconds if elapsed is None else min(elapsed, generation.seconds)
    # The prefill is no pass of the decoding: the engine does not count it either.
    subtitle = (
        f"{sum(generation.lengths[:shown])} tokens: prefill + {max(0, shown - 1)} forward passes, {seconds:.2f} s"
    )
    border = "cyan" if generation is comparison.self_speculative else "white"
    return Panel(text, title=title, subtitle=subtitle, border_style=border if coloured else "none", height=height)


def _written(comparison: Comparison, generation: RecordedGeneration, *, shown: int, coloured: bool) -> Text:
    """The prompt and what the first `shown` forward passes added."""
    text = Text(plain_text(comparison.prompt.tokens), style="dim")
    for block in text_blocks(generation.tokens, generation.lengths)[:shown]:
        if coloured:
            # A blank stands for the line feed, so that its forward pass can be seen.
            text.append(block.text.replace("\n", " \n"), style=_block_style(block.forward))
        else:
            text.append(BAR + block.text)
    return text


def _fold(text: Text, columns: int) -> list[Text]:
    """Lines of at most so many columns, cut anywhere: unlike wrapping at words this keeps every blank."""
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        cuts, used = [], 0
        for position, character in enumerate(line.plain):
            used += cell_len(character)
            if used > columns:
                cuts.append(position)
                used = cell_len(character)
        lines += line.divide(cuts)
    return lines


def _block_style(forward: int) -> str:
    # A colour for the text alone would leave blanks unmarked, and a byte model writes many.
    return "not dim " + BLOCK_STYLES[forward % len(BLOCK_STYLES)]


def _replay(console: Console, comparison: Comparison, *, slowdown: float) -> None:
    ends = max(comparison.plain.seconds, comparison.self_speculative.seconds)
    started = time.perf_counter()
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        while (elapsed := (time.perf_counter() - started) / slowdown) < ends:
            live.update(panes(console, comparison, coloured=True, elapsed=elapsed), refresh=True)
            time.sleep(1 / FRAMES_PER_SECOND)


def _pooled_per_forward(generations: Sequence[RecordedGeneration]) -> float:
    forwards = sum(generation.forwards for generation in generations)
    emitted = sum(len(generation.tokens) - generation.lengths[0] for generation in generations)
    return emitted / forwards if forwards else float("nan")


def _pooled_per_second(generations: Sequence[RecordedGeneration]) -> float:
    return sum(len(generation.tokens) for generation in generations) / sum(g.seconds for g in generations)
