import io
import re

import pytest
from rich.console import Console

from headway.training.data_mix import SourceShare
from headway.training.events import CheckpointWritten, EvaluationDone, Notice, RunEnded, RunStarted, StepDone
from headway.training.progress import TrainingProgress

START = RunStarted(first_step=1, steps=100, tokens_per_step=50, num_future_tokens=2)
KNOWN = {
    "accuracy_per_offset": (0.625, 0.25),
    "offset_weights": (1.0, 0.5),
    "flops": 5_000_000,
    "mfu": 0.381,
    "resident_bytes": 2**30,
    "data_mix": (SourceShare("code", 0.7, 0.698), SourceShare("text", 0.3, 0.302)),
}
EVALUATION = EvaluationDone(
    8,
    {
        "nats": [1.125, 2.25],
        "accuracy": [0.5, 0.375],
        "walk_acceptance_length": 1.5,
        "walk_acceptance_rate": [0.55],
        "decoded_acceptance_rate": [None],
    },
    0.5,
)


def step(number, *, logged=True, loss=(1.25, 2.5), **known):
    return StepDone(
        step=number,
        tokens=50 * number,
        loss=None if loss is None else sum(loss),
        loss_per_offset=loss,
        learning_rate=1e-3,
        gradient_norm=1.0,
        applied=loss is not None,
        skipped_steps=0 if loss is not None else 1,
        tokens_per_second=100.0,
        elapsed_seconds=1.0,
        logged=logged,
        **known,
    )


def shown(*events, terminal=False, width=120):
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream, force_terminal=terminal, width=width, color_system=None))
    for event in events:
        progress(event)
    progress.close()
    return stream.getvalue()


def last_screen(*events, width=120):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(*events, terminal=True, width=width))
    return text[text.rindex("step 1") :]


def test_without_a_terminal_each_logged_step_is_one_plain_line():
    text = shown(START, step(9, logged=False), step(10), RunEnded(True))
    assert text == ("step 10/100  loss 3.750 = 1.250 + 2.500  gradient 1  rate 0.001  100 tokens/s  ETA 0:00:45\n")


def test_a_plain_line_has_what_is_known_and_no_escape_code():
    text = shown(START, step(10, **KNOWN), RunEnded(True))
    assert text == (
        "step 10/100  loss 3.750: 1.250 2.500  weights 1 0.5  accuracy 62.5 25.0 %  gradient 1  rate 0.001  100 tokens/s"
        "  MFU 38.1 %  1.00 GiB  ETA 0:00:45  data code 69.8 % (asked 70.0 %), text 30.2 % (asked 30.0 %)\n"
    )
    assert "\x1b" not in text


def test_on_a_terminal_one_screen_has_everything_that_is_known():
    screen = last_screen(START, EVALUATION, step(10, **KNOWN), step(11, logged=False, loss=(1.0, 2.0)), RunEnded(True))
    rows = [" ".join(line.split()) for line in screen.splitlines()]
    assert rows[0].startswith("step 11/100")
    assert rows[0].endswith("11.0 % 0:00:01 ETA 0:00:49")  # 44.5 s of steps, and evaluations as often as before
    assert rows[1:] == [
        "offset 1 2",
        "loss 1.000 2.000",
        "accuracy 62.5 % 25.0 %",
        "weight in the loss 1 0.5",
        "held-out text, step 8",
        "loss 1.125 2.250",
        "accuracy 50.0 % 37.5 %",
        "accepted - 55.0 %",
        "accepted, decoded - -",
        "tokens per forward: along held-out text 1.50",
        "loss 3.000 gradient norm 1 learning rate 0.001 skipped steps 0",
        "550 tokens 100 tokens/s MFU 38.1 % 1.00 GiB 5e+06 FLOP",
        "data: code 69.8 % (asked 70.0 %), text 30.2 % (asked 30.0 %)",
    ]


def test_what_is_not_known_has_no_place_on_the_screen():
    screen = last_screen(START, step(10), RunEnded(True))
    for word in ("MFU", "accuracy", "GiB", "FLOP", "data:", "held-out", "weight", "tokens per forward"):
        assert word not in screen


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_drops_far_offsets_and_breaks_no_row(width):
    start = RunStarted(first_step=1, steps=100, tokens_per_step=50, num_future_tokens=12)
    screen = last_screen(start, step(10, loss=tuple(range(12))), RunEnded(True), width=width)
    assert max(len(line) for line in screen.splitlines()) <= width
    offsets = (width - 20) // 9
    assert f"{offsets} ..." in screen
    assert len(next(line for line in screen.splitlines() if line.startswith("loss")).split()) == 1 + offsets


def test_evaluations_and_findings_are_lines_of_their_own(tmp_path):
    for terminal in (False, True):
        text = shown(
            Notice("3 documents [dropped]"),
            START,
            EvaluationDone(10, {"nats": [1.0, 2.0], "walk_acceptance_length": 1.5, "absent": None}, 0.5),
            terminal=terminal,
        )
        assert "3 documents [dropped]" in text
        assert "step 10: nats 1.000 2.000; walk_acceptance_length 1.500; absent -" in text


def test_a_step_that_was_skipped_says_so():
    text = shown(START, step(10, loss=None), CheckpointWritten(10, None, 0.1))
    assert "loss not finite" in text
    assert "skipped 1" in text
    assert "step 10: checkpoint written" in text
    assert "not finite" in last_screen(START, step(10, loss=None))
