"""The scripts that measure training run, at a tiny size, and say what they promise."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headway.cli.main import main as headway

REAL_RUN = subprocess.run
ROOT = Path(__file__).resolve().parents[2]
TINY = shlex.split(
    "--hidden-size 32 --num-layers 5 --num-heads 2 --sequence-length 48 --batch-size 2 --gradient-accumulation-steps 1 "
    "--eval-rows 4 --eval-prompts 1 --eval-new-tokens 4 --eval-prompt-tokens 16 --threads 1 --compile off "
    "--held-out-fraction 0.3 --suffixes .txt --no-tensorboard"
)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def in_this_process(command, **options):
    """Stands for a process of its own, whose start would be most of the time."""
    if command[:3] != [sys.executable, "-m", "headway"]:
        return REAL_RUN(command, **options)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = headway(command[3:])
    return subprocess.CompletedProcess(command, status, stdout=output.getvalue())


def test_code_100m_measures_one_and_four_tokens_and_trains_in_the_time_that_is_left(
    benchmarks, corpus, tmp_path, monkeypatch, capsys
):
    import code_100m

    monkeypatch.setattr(code_100m.subprocess, "run", in_this_process)
    monkeypatch.setattr(
        sys, "argv", ["code_100m.py", "--minutes", "0.02", "--probe-steps", "3", "--data", str(corpus), "--", *TINY]
    )
    code_100m.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["speed_n1"]["parameters"] == found["speed_n4"]["parameters"]
    assert found["speed_n1"]["steps"] == found["speed_n4"]["steps"] == 3
    assert found["trained_n4"]["steps"] >= 4
    for run in ("speed_n1", "speed_n4", "trained_n4"):
        assert found[run]["tokens_per_second"] > 0
        assert 0 < found[run]["mfu"] < 1
        assert found[run]["peak_memory_gib"] > 0
    assert len(found["held_out_nats_per_offset"]) == 4
    assert 1 <= found["held_out_tokens_per_forward"] <= 4
    assert 1 <= found["decoded_tokens_per_forward"] <= 4


def test_code_100m_says_which_command_failed(benchmarks, tmp_path, monkeypatch):
    import code_100m

    monkeypatch.setattr(code_100m.subprocess, "run", in_this_process)
    with pytest.raises(SystemExit, match=r"--data nowhere .* ended with status 2"):
        code_100m.train(tmp_path, "run", {"recipe": "code-100m", "data": "nowhere"}, TINY)


def test_checkpointing_times_a_step_a_save_and_a_resume(benchmarks, monkeypatch, capsys):
    import checkpointing

    monkeypatch.setattr(
        sys,
        "argv",
        ["checkpointing.py", "--sizes", "1M", "--repeats", "5", "--batch", "1", "--length", "16", "--threads", "1"],
    )
    checkpointing.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    # weights and two moments in float32, and a little more
    assert 12 <= row["bytes_per_parameter"] < 13
    assert row["save_seconds"] > 0
    assert row["resume_seconds"] > 0
    assert row["save_over_step"] == pytest.approx(row["save_seconds"] / row["step_seconds"], rel=0.05)
