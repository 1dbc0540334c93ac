import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from headway.experiments.demo.generation import RecordedGeneration
from headway.experiments.demo.side_by_side import (
    describe_slowdown,
    panes,
    replay_slowdown,
    show_comparisons,
    verdict_line,
)
from headway.experiments.demo.tables import acceptance_table, likelihood_table, rich_table, speed_table


def console_of(width=140, *, terminal=False, **options):
    return Console(file=io.StringIO(), width=width, height=60, force_terminal=terminal, **options)


def printed(console):
    return console.file.getvalue()


def test_without_a_terminal_bars_stand_where_forward_passes_end(comparison):
    console = console_of()
    show_comparisons(console, [comparison], seconds=0.01)
    text = printed(console)
    assert "\x1b" not in text
    assert "\u2502if \u2502x" not in text
    assert "\u2502i\u2502f x\u2502<\u2502y:\u2502" in text
    assert "identical: yes" in text
    assert "tokens per forward: 2.20 (plain 1.00)" in text


def test_a_terminal_gets_colours_and_the_replay_ends_with_the_whole_text(comparison):
    console = console_of(terminal=True, color_system="truecolor")
    show_comparisons(console, [comparison, comparison], seconds=0.2)
    text = printed(console)
    assert "48;2;" in text, "forward passes have background colours"
    assert "times faster than it ran" in text
    assert text.count("identical: ") == 2


def test_no_color_falls_back_to_bars(comparison):
    console = console_of(terminal=True, no_color=True)
    show_comparisons(console, [comparison], seconds=0.01)
    assert "\u2502i\u2502f x\u2502" in printed(console)
    assert "48;2;" not in printed(console)


@pytest.mark.parametrize(("width", "side_by_side"), [(140, True), (60, False)])
def test_a_narrow_terminal_puts_the_panes_one_under_the_other(comparison, width, side_by_side):
    console = console_of(width=width)
    console.print(panes(console, comparison, coloured=False))
    lines = printed(console).splitlines()
    both = [line for line in lines if "plain decoding" in line and "self-speculative decoding" in line]
    assert bool(both) == side_by_side
    assert all(len(line) <= width for line in lines)


def test_panes_show_what_had_been_emitted_by_then(comparison):
    console = console_of()
    # The prefill's token comes at 0.01 s, the first block of three at 0.02 s.
    console.print(panes(console, comparison, coloured=False, elapsed=0.021))
    assert "2 tokens: prefill + 1 forward passes" in printed(console)
    assert "4 tokens: prefill + 1 forward passes" in printed(console)


@pytest.mark.parametrize("width", [140, 57])
def test_no_blank_of_a_long_run_is_lost(comparison, width):
    blanks = RecordedGeneration((32,) * 256, (1, *[3] * 85), tuple(range(86)), 86.0, 85)
    console = console_of(width=width)
    console.print(panes(console, replace(comparison, self_speculative=blanks), coloured=False))
    assert printed(console).count("\u2502   ") >= 85 - 12, "but where a line was cut, three blanks stand after each bar"
    assert "\u2026" not in printed(console)
    assert all(len(line) <= width for line in printed(console).splitlines())


def test_wide_characters_do_not_push_the_frame(comparison):
    text = "\u4e2d\u6587".encode() * 40
    wide = RecordedGeneration(tuple(text), (3,) * 80, tuple(range(80)), 80.0, 79)
    console = console_of(width=61)
    console.print(panes(console, replace(comparison, self_speculative=wide), coloured=False))
    assert {cell_len(line) for line in printed(console).splitlines()} == {61}


@pytest.mark.parametrize("width", [140, 50])
def test_frames_of_a_replay_keep_their_height_and_fit_the_screen(comparison, width):
    text = b"".join(b"line %d\n" % number for number in range(40))
    generation = RecordedGeneration(
        tuple(text), (1,) * len(text), tuple(range(1, len(text) + 1)), len(text), len(text) - 1
    )
    long = replace(comparison, plain=generation, self_speculative=generation)
    heights = set()
    for elapsed in (0.0, 50.0, 200.0, 400.0):
        console = Console(file=io.StringIO(), width=width, height=20)
        console.print(panes(console, long, coloured=False, elapsed=elapsed))
        heights.add(len(printed(console).splitlines()))
    assert len(heights) == 1
    assert heights.pop() < 20
    assert "line\u2502 \u25023\u25027" in printed(console).replace("l\u2502i\u2502n\u2502e", "line"), (
        "the last lines are shown"
    )


def test_hostile_bytes_and_names_reach_the_terminal_as_pictures(hostile_comparison):
    console = console_of(width=90)
    show_comparisons(console, [hostile_comparison], seconds=0.01)
    text = printed(console)
    assert not {"\x1b", "\x07", "\r", "\x9b", "\x00"} & set(text)
    assert "\u241b" in text
    assert "[/red][bold]" in text.replace("\u2502", "").replace(" ", "").replace("\n", "")
    assert "identical: no" in text


def test_an_ascii_stream_does_not_break_the_demo(comparison):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    show_comparisons(Console(file=stream, width=120), [comparison], seconds=0.01)
    stream.flush()
    assert b"identical: yes" in raw.getvalue()


def test_the_verdict_pools_prompts_and_one_difference_is_a_no(comparison, hostile_comparison):
    assert "identical: yes" in verdict_line([comparison, comparison]).plain
    assert "identical: no" in verdict_line([comparison, hostile_comparison]).plain
    # 12 tokens in 0.12 s and in 0.06 s
    assert "tokens/s: 200 (plain 100)" in verdict_line([comparison]).plain


def test_the_replay_lasts_as_long_as_asked(comparison):
    assert replay_slowdown([comparison, comparison], seconds=2.4) == pytest.approx(10.0)
    assert describe_slowdown(10.0) == "10.0 times slower than it ran"


def test_tables_hold_every_figure_and_a_dash_where_none_was_measured(demo_result):
    likelihood = likelihood_table(demo_result.likelihood)
    assert likelihood.rows[1] == ("2", "2.000", "2.890", "40.0 %")
    assert likelihood.rows[3] == ("4", "-", "-", "-")
    acceptance = acceptance_table(demo_result.walk, demo_result.generated)
    assert acceptance.rows[0][:3] == ("held-out (loop-free)", "2.20", "60.0 %")
    speed = speed_table(demo_result.speed)
    assert speed.rows[1] == ("self-speculative", "2.00", "150", "140 to 170", "1.56x", "1.50x to 1.62x")
    console = console_of(width=150)
    for table in (likelihood, acceptance, speed):
        console.print(rich_table(table))
    assert "loop-free" in printed(console)
