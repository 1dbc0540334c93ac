"""A process that is killed: what the other one says, and what the run folder is good for afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.training.config import TrainConfig
from headway.training.events import Notice
from headway.training.loop import train
from headway.training.metric_files import read_metrics
from small_runs import run_fields

PATIENCE = 120.0


def started(rank: int, corpus: Path, output: Path, store: Path) -> subprocess.Popen[str]:
    """One of two processes of a run that would go on for long."""
    script = f"""
import torch.distributed as dist
from headway.training.config import TrainConfig
from headway.training.loop import train
from headway.errors import HeadwayError
dist.init_process_group("gloo", init_method="file://{store}", rank={rank}, world_size=2)
try:
    train(TrainConfig(**{run_fields(corpus, output, steps=100_000, device="cpu", parallel="fsdp")!r}))
except HeadwayError as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
    import os
    os._exit(2)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_killed_process_ends_the_other_with_one_sentence_and_one_process_goes_on(corpus, tmp_path):
    output = tmp_path / "run"
    pair = [started(rank, corpus, output, tmp_path / "store") for rank in (0, 1)]
    try:
        deadline = time.monotonic() + PATIENCE
        while len(read_metrics(output / "metrics.jsonl")) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(pair[1].pid, signal.SIGKILL)
        said, _ = pair[0].communicate(timeout=PATIENCE)
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert pair[0].returncode == 2
    assert said.startswith("TrainingError: lost another of the 2 processes in ")
    assert "start the same command again, it goes on from the last checkpoint" in said
    done = max(int(path.name[5:]) for path in (output / "checkpoints").glob("step-*"))
    told: list[str] = []
    result = train(
        TrainConfig(**run_fields(corpus, output, steps=done + 2, device="cpu")),
        on_event=lambda event: told.append(event.text) if isinstance(event, Notice) else None,
    )
    assert (result.resumed_from_step, result.steps) == (done, done + 2)
    assert any("this run had 2 processes and now has 1" in text for text in told)
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, done + 3))
