import io

from rich.console import Console

from headway.training.events import CheckpointWritten, EvaluationDone, Notice, RunEnded, RunStarted, StepDone
from headway.training.progress import TrainingProgress

START = RunStarted(first_step=1, steps=100, tokens_per_step=50, num_future_tokens=2)


def step(number, *, logged=True, loss=(1.25, 2.5)):
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
    )


def shown(*events, terminal=False):
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream, force_terminal=terminal, width=120, color_system=None))
    for event in events:
        progress(event)
    progress.close()
    return stream.getvalue()


def test_without_a_terminal_each_logged_step_is_one_plain_line():
    text = shown(START, step(9, logged=False), step(10), RunEnded(True))
    assert text == "step 10/100  loss 1.250 2.500  100 tokens/s  ETA 0:00:45\n"


def test_on_a_terminal_one_line_moves_with_loss_speed_and_time_left():
    text = shown(START, step(10), RunEnded(True), terminal=True)
    assert "step 10/100" in text
    assert "loss 1.250 2.500" in text
    assert "100 tokens/s  ETA 0:00:45" in text


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
