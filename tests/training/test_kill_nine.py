import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked")
def test_runs_killed_ten_times_end_as_if_nobody_had_killed_them(tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_nine.py"), "--times", "10", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == 10
    assert sum(figures["kills_by_phase"].values()) == 10
    assert figures["runs_finished"] >= 1
    assert figures["runs_that_differ"] == {}
    # no more than the steps since the last checkpoint are done again
    assert figures["most_steps_lost_by_a_kill"] <= figures["setting"]["checkpoint_every_steps"]

    # and a difference would have been seen
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kill_nine import differences

    straight, run = tmp_path / "straight", tmp_path / "run0"
    assert differences(straight, run) == []
    weights = run / "model" / "mtp" / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"learning_rate"', '"rate"', 1))
    assert differences(straight, run) == ["model/mtp/heads.safetensors", "metrics.jsonl"]
