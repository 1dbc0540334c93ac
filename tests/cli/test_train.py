import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from headway.cli.main import main
from headway.cli.train import train_command
from headway.training.config import TrainConfig
from headway.training.fields import field_specs
from small_runs import assert_same_run, lines, run_fields, write_corpus

PROGRAM = [sys.executable, "-c", "import sys; from headway.cli.main import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def flags(fields):
    """A configuration's fields as command-line words."""
    words = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))]
        else:
            words += [flag, "none" if value is None else str(value)]
    return words


def start(fields):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PROGRAM, "train", *flags(fields)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_steps(process, folder, steps):
    metrics = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {steps} steps: {process.poll()} {process.stderr.read() if process.stderr else ''}")


def test_every_field_is_a_flag_with_help_unit_and_default():
    text = " ".join(CliRunner().invoke(train_command, ["--help"], terminal_width=200).output.split())
    for spec in field_specs(TrainConfig).values():
        assert spec.flag in text, spec.name
        assert " ".join(spec.help.split()) in text, spec.name
    assert "[tokens; default: 256]" in text
    assert "[default: 0.9,0.95]" in text


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from headway.cli.main import main; main(['train', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--learning-rat", "1"], "--learning-rate"),
        (["--recipe", "tiny"], "did you mean 'tiny-bytes'"),
        (["--recipe", "tiny-bytes", "--steps", "1.5"], "--steps takes a whole number"),
        (["--recipe", "tiny-bytes", "--optimizer", "sgd"], "one of adamw, muon"),
        (["--config", "absent.yaml"], "absent.yaml"),
        ([], "the model is not given"),
    ],
)
def test_a_mistake_on_the_line_is_one_sentence_and_status_two(words, told, capsys):
    assert main(["train", *words]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1


def test_a_mistyped_key_of_a_file_is_answered_with_the_nearest_name(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("batchsize: 3\n")
    assert main(["train", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "did you mean 'batch_size'" in capsys.readouterr().err


def test_the_dry_run_plans_without_training_and_ends_in_one_json_line(tmp_path, capsys):
    output = tmp_path / "planned"
    words = ["--recipe", "tiny-bytes", "--size", "100M", "--output", str(output), "--suffixes", ".py", "--dry-run"]
    assert main(["train", *words]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert captured.out.count("\n") == 1
    assert document["config"]["size"] == "100M"
    assert document["config"]["suffixes"] == [".py"]
    assert document["plan"]["total_parameters"] > 99_000_000
    assert document["plan"]["memory"]["total"] > 4 * 4 * 99_000_000 * 0.7
    assert "size: 100M" in captured.err
    assert "99.51 M" in captured.err
    assert not output.exists()


@pytest.mark.slow
def test_a_run_killed_with_kill_nine_is_continued_bit_for_bit(corpus, tmp_path, capsys):
    options = {"steps": 24, "checkpoint_every_steps": 5, "eval_every_steps": 8, "eval_prompts": 1, "optimizer": "muon"}
    assert main(["train", *flags(run_fields(corpus, tmp_path / "straight", **options))]) == 0
    capsys.readouterr()
    fields = run_fields(corpus, tmp_path / "killed", **options)
    for steps in (7, 17):
        process = start(fields)
        wait_for_steps(process, tmp_path / "killed", steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert main(["train", *flags(fields)]) == 0
    captured = capsys.readouterr()
    assert "resuming from" in captured.err
    document = json.loads(captured.out.splitlines()[-1])
    assert document["steps"] == 24
    assert document["resumed_from_step"] >= 15
    assert len(document["evaluation"]["nats"]) == 3
    assert document["evaluation"]["decoded_acceptance_length"] >= 1
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=24)
    assert [line["step"] for line in lines(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_the_run_can_be_continued(corpus, tmp_path, capsys, number, status):
    fields = run_fields(corpus, tmp_path / "run", steps=3000, checkpoint_every_steps=None)
    process = start(fields)
    wait_for_steps(process, tmp_path / "run", 6)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status
    assert stdout == ""
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"{signal.Signals(number).name}: saved step {step}" in stderr
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step
    assert not (tmp_path / "run" / "result.json").exists()
    assert main(["train", *flags(fields | {"steps": step + 2})]) == 0
    assert f"({step} steps done)" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 3))
