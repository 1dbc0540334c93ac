"""Disks that fill up or turn read-only, memory that runs out, two processes at once: one message, a usable run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway import MultiTokenLM
from headway.errors import CheckpointError, TrainingError
from headway.training import checkpoint as checkpoint_module
from headway.training import final_model as final_model_module
from headway.training import run as run_module
from headway.training.events import CheckpointWritten
from headway.training.loop import train
from headway.training.out_of_memory import is_out_of_memory
from small_runs import assert_same_run

OWN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = [*OWN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    if not can_mount():
        pytest.skip("a disk of one's own needs unshare and user namespaces")
    folder = tmp_path_factory.mktemp("faults")
    command = [*OWN_NAMESPACE, sys.executable, str(Path(__file__).parents[1] / "fault_cases.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {outcome["case"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


FAULTS = {
    "full when the text is encoded": ("DataError", ["token cache", "No space left on device", "free some space"], []),
    "full when the metrics are written": ("TrainingError", ["cannot write metrics", "No space left", "free space"], []),
    "full when a checkpoint is begun": ("CheckpointError", ["step-00000002", "No space left", "free space"], []),
    "full in the middle of a checkpoint": ("CheckpointError", ["step-00000004", "No space left", "untouched"], [2]),
    "full when the model is written": ("CheckpointError", ["finished model", "No space left", "same weights"], [4, 6]),
    "full in the middle of the model": ("CheckpointError", ["finished model", "No space left", "same weights"], [4, 6]),
    "read-only when a checkpoint is written": ("CheckpointError", ["step-00000004", "Read-only file system"], [2]),
    "read-only from the start": ("TrainingError", ["cannot write to the output folder", "Read-only", "--output"], []),
    "out of memory": (
        "TrainingError",
        [
            "out of memory in step 1",
            "GiB",
            "batch_size=128",
            "gradient_accumulation_steps=1",
            "--gradient-checkpointing",
            "loss_chunk_tokens=1024",
        ],
        [],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_message_and_the_same_command_goes_on_once_it_is_mended(outcomes, case):
    kind, words, whole = FAULTS[case]
    outcome = outcomes[case]
    assert outcome["error"] == kind
    assert [word for word in words if word not in outcome["message"]] == []
    assert "\n" not in outcome["message"]
    assert outcome["whole_checkpoints"] == whole
    assert outcome["half_written"] == []
    assert outcome["steps_after_mending"] == 6


@pytest.mark.slow
def test_of_two_processes_that_start_a_run_at_once_one_trains_and_one_is_told(outcomes):
    trained, told = sorted(outcomes["two processes at once"]["messages"], reverse=True)
    assert trained == "trained 60"
    assert told.startswith("TrainingError: another process is training in")


class Killed(BaseException):
    """Ends a run from inside, as a kill does."""


def test_a_final_save_that_a_kill_ended_is_done_again(make_config, tmp_path, monkeypatch):
    train(make_config("straight"))

    def killed(*args):
        raise Killed

    monkeypatch.setattr(final_model_module, "save_tokenizer", killed)
    monkeypatch.setattr(final_model_module.shutil, "rmtree", lambda *args, **options: None)
    with pytest.raises(Killed):
        train(make_config("killed"))
    monkeypatch.undo()
    run = tmp_path / "killed"
    assert (run / ".writing-model" / "model" / "config.json").exists()
    assert not (run / "model").exists()
    assert train(make_config("killed")).resumed_from_step == 6
    assert not (run / ".writing-model").exists()
    assert_same_run(tmp_path / "straight", run, step=6)


def test_what_the_tokenizers_library_cannot_write_is_told_like_any_full_disk(make_config, monkeypatch):
    class Full:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")  # as the library has it

    with pytest.raises(OSError, match="No space left"):
        checkpoint_module.save_tokenizer(Full(), Path("anywhere"))


def test_memory_that_a_gpu_lacks_is_told_with_what_helps_and_the_run_goes_on(make_config, tmp_path, monkeypatch):
    real, calls = run_module.optimizer_step, []

    def step(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 MiB free")
        return real(*args, **options)

    train(make_config("straight"))
    monkeypatch.setattr(run_module, "optimizer_step", step)
    with pytest.raises(TrainingError, match="out of memory in step 4") as caught:
        train(make_config("short", gradient_checkpointing=True))
    monkeypatch.undo()
    message = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in message
    assert "GPU 0" not in message
    assert "halve batch_size=2 and double gradient_accumulation_steps=1" in message
    assert "--gradient-checkpointing" not in message
    assert train(make_config("short", gradient_checkpointing=True)).resumed_from_step == 2
    assert_same_run(tmp_path / "straight", tmp_path / "short", step=6)


def test_other_errors_are_not_taken_for_memory(make_config, monkeypatch):
    def step(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(run_module, "optimizer_step", step)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(make_config())
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(CheckpointError("Cannot allocate memory"))


def test_an_evaluation_that_needs_too_much_memory_is_told_too(make_config):
    def hungry(model, step):
        raise MemoryError

    with pytest.raises(TrainingError, match=r"in the evaluation after step 2 \(MemoryError\).*lower eval_rows=64"):
        train(make_config(eval_every_steps=2), evaluators=[hungry])


def test_a_checkpoint_of_the_run_can_be_generated_from_as_it_is(make_config, tmp_path):
    paths = []
    train(make_config(), on_event=lambda e: paths.append(e.path) if isinstance(e, CheckpointWritten) else None)
    model = MultiTokenLM.from_pretrained(paths[-1] / "model")
    assert model.generate(torch.tensor([[104, 101]]), max_new_tokens=3).shape == (1, 5)
