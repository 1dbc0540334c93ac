"""kill -9 a real `headway train` at random moments, resume it each time, and compare with a run that nobody killed.

Every attempt is a process of its own that runs the `headway train` command; it is forked from this one, which has torch
imported already, so that an attempt costs a tenth of a second. Some of the kills come at a random time, the others at a
random moment inside the next phase of one kind: reading and tokenising, a step, an evaluation, the write of a checkpoint,
the final save.
After every kill each checkpoint on disk must be whole, and the newest no older than before. A run that gets to its end
is compared with the undisturbed one - weights, optimizer, random states, metrics, evaluations, TensorBoard steps, bit for
bit - and the next one starts. One JSON document last; exit status 1 where anything differs.

    python benchmarks/kill_nine.py [--times 100] [--seed 0] [--output benchmarks/results/kill_nine.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PHASES = ("other", "reading and tokenising", "step", "evaluation", "checkpoint", "final save")
# Where a phase begins and ends: module, name, phase.
MARKS = (
    ("headway.training.loop", "prepare_data", "reading and tokenising"),
    ("headway.training.run", "optimizer_step", "step"),
    ("headway.training.run", "TrainingRun._evaluate", "evaluation"),
    ("headway.training.run", "write_checkpoint", "checkpoint"),
    ("headway.training.loop", "write_final_model", "final save"),
)
STEPS, CHECKPOINT_EVERY, EVALUATE_EVERY = 16, 3, 5
OF_THE_MACHINE = ("tokens_per_second", "elapsed_seconds", "seconds", "mfu", "resident_bytes", "gpu_peak_bytes")
LIMIT_SECONDS = 120.0
LONGEST_PHASE_SECONDS = 0.03


def write_corpus(folder: Path) -> Path:
    """Eight packages of small texts, the same at every call."""
    draw = random.Random(7)
    words = ["trunk", "head", "token", "offset", "draft", "block", "accept", "cache", "row", "step", "loss", "mean"]
    for group in range(8):
        (folder / f"package{group}").mkdir(parents=True)
        for number in range(6):
            text = " ".join(draw.choice(words) for _ in range(40 + 10 * number))
            (folder / f"package{group}" / f"text{number}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def command(corpus: Path, output: Path, extra: list[str]) -> list[str]:
    """Arguments of `headway` for a run of about a second, with dropout-free but random data order."""
    options: dict[str, Any] = {
        "hidden-size": 32,
        "num-layers": 4,
        "num-heads": 2,
        "num-future-tokens": 3,
        "data": corpus,
        "held-out-fraction": 0.25,
        "sequence-length": 48,
        "batch-size": 2,
        "gradient-accumulation-steps": 2,
        "loader-workers": 1,
        "steps": STEPS,
        "learning-rate": 0.003,
        "threads": 1,
        "eval-every-steps": EVALUATE_EVERY,
        "eval-rows": 4,
        "eval-prompts": 1,
        "eval-prompt-tokens": 16,
        "eval-new-tokens": 8,
        "checkpoint-every-steps": CHECKPOINT_EVERY,
        "log-every-steps": 1,
        "output": output,
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value))), *extra]


class Attempt:
    """One process that runs the command, and the phase that it is in."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        """Fork it."""
        self.log = log
        self._phase = mmap.mmap(-1, 1)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments)

    def _run(self, arguments: list[str]) -> None:
        status = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            for module, name, phase in MARKS:
                self._mark(module, name, PHASES.index(phase))
            from headway.cli.main import main as headway

            status = headway(arguments)
            sys.stdout.flush()
        finally:
            # Not exit(): what the parent has open is the parent's to close.
            os._exit(status)

    def _mark(self, module: str, name: str, phase: int) -> None:
        owner: Any = importlib.import_module(module)
        *path, attribute = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        real: Callable[..., Any] = getattr(owner, attribute)

        def marked(*args: Any, **kwargs: Any) -> Any:
            former = self._phase[0]
            self._phase[0] = phase
            try:
                return real(*args, **kwargs)
            finally:
                self._phase[0] = former

        setattr(owner, attribute, marked)

    @property
    def phase(self) -> str:
        """What the process is doing."""
        return PHASES[self._phase[0]]

    def ended(self) -> bool:
        """Whether it came to its end by itself.

        Raises:
            RuntimeError: it failed; its last lines are told.
        """
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise RuntimeError(f"headway train ended with status {code}: {self.log.read_text()[-2000:]}")
        return True

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False where the process ended before."""
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self.ended():
                return False
            if time.monotonic() > end:
                self.kill()
                raise RuntimeError(
                    f"headway train did not end within {LIMIT_SECONDS:g} s: {self.log.read_text()[-2000:]}"
                )
            time.sleep(0.0003)
        return True

    def kill(self) -> None:
        """Send SIGKILL, as kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def to_the_end(arguments: list[str], log: Path) -> float:
    """Run undisturbed; seconds."""
    began = time.monotonic()
    Attempt(arguments, log).wait(lambda: False)
    return time.monotonic() - began


def kill_at_random(attempt: Attempt, draw: random.Random, *, typical_seconds: float) -> str | None:
    """Kill an attempt at a random moment; the phase it was in, or None where it ended before."""
    phase = draw.choice(PHASES[1:]) if draw.random() < 0.6 else None
    # Text is read at the beginning: a delay would miss it.
    longest = 0.0 if phase == "reading and tokenising" else 0.6 * typical_seconds
    moments = [time.monotonic() + draw.uniform(0, longest)]
    if not attempt.wait(lambda: time.monotonic() >= moments[-1]):
        return None
    if phase is not None:
        if not attempt.wait(lambda: attempt.phase == phase):
            return None
        moments.append(time.monotonic() + draw.uniform(0, LONGEST_PHASE_SECONDS))
        if not attempt.wait(lambda: time.monotonic() >= moments[-1] or attempt.phase != phase):
            return None
    found = attempt.phase
    attempt.kill()
    return found


def check_readable(output: Path, *, newest_before: int) -> int:
    """Check every checkpoint on disk and give the newest one's step.

    Raises:
        HeadwayError: one is damaged.
        RuntimeError: the newest is older than it was.
    """
    from headway.training.checkpoint import checkpoint_paths, read_checkpoint

    steps = [read_checkpoint(path).state.step for path in checkpoint_paths(output / "checkpoints")]
    newest = max(steps, default=0)
    if newest < newest_before:
        raise RuntimeError(f"the newest checkpoint was of step {newest_before}, is of step {newest}")
    return newest


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file without what the machine decides: times and memory."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name not in OF_THE_MACHINE} for record in records]


def differences(wanted: Path, got: Path) -> list[str]:
    """What of two finished runs is not the same, bit for bit."""
    found = []
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    for name in ("model/model.safetensors", "model/mtp/heads.safetensors", f"{last}/optimizer.safetensors"):
        if (wanted / name).read_bytes() != (got / name).read_bytes():
            found.append(name)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        if lines(wanted / name) != lines(got / name):
            found.append(name)
    runs = [json.loads((folder / last / "run.json").read_text()) for folder in (wanted, got)]
    for run in runs:
        del run["state"]["elapsed_seconds"], run["config"]["output"]
    if runs[0] != runs[1]:
        found.append(f"{last}/run.json")
    if (wanted / "checkpoints" / "best.json").read_bytes() != (got / "checkpoints" / "best.json").read_bytes():
        found.append("checkpoints/best.json")
    if {path.name for path in got.iterdir()} - {path.name for path in wanted.iterdir()}:
        found.append("files left behind")
    if board_steps(got) != list(range(1, STEPS + 1)):
        found.append(f"TensorBoard steps {board_steps(got)}")
    return found


def board_steps(output: Path) -> list[int]:
    """Steps that TensorBoard shows for the loss."""
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )
    from tensorboard.util.tb_logging import get_logger

    get_logger().setLevel("ERROR")  # it tells of every resume that it finds

    board: Any = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("train/loss")]


def warm_up(arguments: list[str]) -> None:
    """Import what an attempt needs, without computing anything: a fork must not inherit threads."""
    torch.set_num_threads(1)
    for module in ("headway.cli.train", "headway.training.loop", "headway.evaluation.periodic"):
        importlib.import_module(module)
    for module in (
        "headway.training.progress",
        "transformers.models.llama.modeling_llama",
        "rich.progress",
        "rich.table",
    ):
        importlib.import_module(module)


def main() -> int:
    """Kill, resume and compare; print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--folder", type=Path, help="work here and keep everything; default: a temporary folder")
    parser.add_argument("extra", nargs="*", help="further options of headway train, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        document = campaign(arguments.folder or Path(temporary), arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
    return 1 if document["runs_that_differ"] else 0


def campaign(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs with kills until there were enough of them; figures."""
    from headway.provenance import provenance

    draw, log = random.Random(arguments.seed), folder / "log.txt"
    corpus = write_corpus(folder / "corpus")
    straight = folder / "straight"
    warm_up(command(corpus, straight, arguments.extra))
    began = time.monotonic()
    seconds = to_the_end(command(corpus, straight, arguments.extra), log)
    print(f"undisturbed: {STEPS} steps in {seconds:.2f} s", file=sys.stderr)
    phases: Counter[str] = Counter()
    kills_of_runs: list[int] = []
    differing: dict[str, list[str]] = {}
    lost: list[int] = []
    while sum(phases.values()) < arguments.times:
        output = folder / f"run{len(kills_of_runs)}"
        kills, newest, finished = 0, 0, False
        while not finished:
            attempt = Attempt(command(corpus, output, arguments.extra), log)
            if sum(phases.values()) >= arguments.times:
                finished = not attempt.wait(lambda: False)
                continue
            phase = kill_at_random(attempt, draw, typical_seconds=seconds)
            # A kill may come after the result is written and before the process is gone.
            finished = phase is None or (output / "result.json").exists()
            if phase is not None:
                kills += 1
                phases["after the end" if finished else phase] += 1
                newest = check_readable(output, newest_before=newest)
                lost.append(last_step(output) - newest)
        kills_of_runs.append(kills)
        wrong = differences(straight, output)
        if wrong:
            differing[output.name] = wrong
        print(f"{output.name}: {kills} kills, {'differs: ' + ', '.join(wrong) if wrong else 'equal'}", file=sys.stderr)
    return {
        "benchmark": "kill_nine",
        "setting": {
            "steps": STEPS,
            "checkpoint_every_steps": CHECKPOINT_EVERY,
            "eval_every_steps": EVALUATE_EVERY,
            "seed": arguments.seed,
            "extra": arguments.extra,
        },
        "kills": sum(phases.values()),
        "kills_by_phase": dict(sorted(phases.items())),
        "runs_finished": len(kills_of_runs),
        "kills_of_each_run": kills_of_runs,
        "most_steps_lost_by_a_kill": max(lost, default=0),
        "unreadable_checkpoints": 0,
        "runs_that_differ": differing,
        "seconds": round(time.monotonic() - began, 1),
        "provenance": provenance(),
    }


def last_step(output: Path) -> int:
    """The last step that the metrics know."""
    from headway.training.metric_files import read_metrics

    return max((record["step"] for record in read_metrics(output / "metrics.jsonl")), default=0)


if __name__ == "__main__":
    sys.exit(main())
