import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from headway.data.sources import iter_files
from headway.data.split import split_by_group
from headway.errors import CheckpointError, TrainingError
from headway.training import run as run_module
from headway.training.events import CheckpointWritten, Notice, StepDone
from headway.training.interruption import TrainingInterruptedError
from headway.training.loop import train
from headway.training.run_directory import claimed
from small_runs import assert_same_run, lines, write_corpus


class Killed(BaseException):
    """Ends a run from inside, as a kill does: nothing after it runs but `finally`."""


def killed_after(step):
    def listener(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return listener


def train_killed(config, step):
    with pytest.raises(Killed):
        train(config, on_event=killed_after(step))


def counting(model, step):
    return {"weight_sum": float(sum(p.double().sum() for p in model.parameters())), "per_offset": [step, 2 * step]}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optimizer": "muon", "precision": "bfloat16-residual"},
        {"gradient_accumulation_steps": 3, "gradient_checkpointing": True, "tie_embeddings": True},
        # 24 documents in rows of 48: six steps of eight rows cross the end of an epoch.
        {"batch_size": 8, "family": "qwen3", "num_kv_heads": 1, "initialization": "scaled"},
    ],
    ids=["adamw", "muon-bfloat16", "accumulation-checkpointing-tied", "epoch-end-qwen3"],
)
@pytest.mark.parametrize("step", [3, 5])
def test_a_killed_run_continues_bit_for_bit(make_config, tmp_path, overrides, step):
    train(make_config("straight", **overrides))
    killed = make_config("killed", **overrides)
    train_killed(killed, step)
    result = train(killed)
    assert result.resumed_from_step == step - 1
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=6)


def test_random_states_continue_too(make_config, tmp_path, with_dropout):
    train(make_config("straight", **with_dropout))
    train_killed(make_config("killed", **with_dropout), 5)
    torch.rand(7)
    train(make_config("killed", **with_dropout))
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_micro_batches_undoes_the_step_and_saves(
    make_config, tmp_path, with_dropout, monkeypatch, number
):
    real = run_module.optimizer_step
    calls = []

    def step(model, optimizer, batches, **options):
        calls.append(1)
        if len(calls) != 4:
            return real(model, optimizer, batches, **options)
        forwards = []
        hook = model.heads[0].register_forward_hook(lambda *_: forwards.append(1) or signal.raise_signal(number))
        outcome = real(model, optimizer, batches, **options)
        hook.remove()
        assert outcome is None
        assert len(forwards) == 1
        return outcome

    train(make_config("straight", **with_dropout))
    stopped = make_config("stopped", checkpoint_every_steps=None, **with_dropout)
    monkeypatch.setattr(run_module, "optimizer_step", step)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterruptedError, match="saved step 3") as caught:
        train(stopped)
    monkeypatch.undo()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert (caught.value.signal_number, caught.value.step) == (number, 3)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]
    train(stopped)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", step=6)


def test_an_evaluation_that_a_signal_left_no_time_for_comes_first_after_the_resume(make_config, tmp_path):
    options = {"eval_every_steps": 3}
    train(make_config("straight", **options), evaluators=[counting])

    def signal_at_three(event):
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    stopped = make_config("stopped", **options)
    with pytest.raises(TrainingInterruptedError):
        train(stopped, evaluators=[counting], on_event=signal_at_three)
    assert not (tmp_path / "stopped" / "evaluations.jsonl").read_text()
    train(stopped, evaluators=[counting])
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", step=6)


def test_a_run_killed_again_and_again_loses_and_doubles_no_step(make_config, tmp_path):
    options = {"eval_every_steps": 3, "steps": 8}
    train(make_config("straight", **options), evaluators=[counting])
    killed = make_config("killed", **options)
    for step in (1, 3, 4, 5, 5, 7):
        with pytest.raises(Killed):
            train(killed, evaluators=[counting], on_event=killed_after(step))
    train(killed, evaluators=[counting])
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=8)
    assert [line["step"] for line in lines(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 9))
    assert [line["step"] for line in lines(tmp_path / "killed" / "evaluations.jsonl")] == [3, 6, 8]


def test_half_a_line_of_metrics_is_dropped_on_resume(make_config, tmp_path):
    train_killed(make_config(), 3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(make_config())
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


def test_tensorboard_shows_every_step_once_after_resumes(make_config, tmp_path):
    config = make_config(tensorboard=True)
    for step in (3, 5):
        train_killed(config, step)
    train(config)
    for tag in ("train/loss", "train/loss_offset_3", "train/learning_rate", "train/gradient_norm"):
        assert scalar_steps(tmp_path / "run", tag) == list(range(1, 7)), tag


def scalar_steps(folder, tag):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars(tag)]


def test_no_reader_of_event_files_sees_a_step_twice_or_misses_one(make_config, tmp_path):
    config = make_config(tensorboard=True, checkpoint_every_steps=3, eval_every_steps=2)
    for step in (3, 5):  # one kill with nothing, one with two steps beyond its checkpoint
        with pytest.raises(Killed):
            train(config, evaluators=[counting], on_event=killed_after(step))
    newest = max((tmp_path / "run" / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    train(config, evaluators=[counting])
    seen = {}
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
    evaluated = {tag for tag in seen if tag.startswith("evaluation/")}
    assert {"evaluation/per_offset/offset_2", "train/loss", "train/accuracy_offset_3", "train/flops"} <= seen.keys()
    for tag, steps in seen.items():
        assert steps == ([2, 4, 6] if tag in evaluated else [1, 2, 3, 4, 5, 6]), tag
        assert scalar_steps(tmp_path / "run", tag) == steps, tag


def test_metrics_of_a_checkpoint_are_on_disk_before_it_exists(make_config, tmp_path):
    seen = []

    def look(event):
        if isinstance(event, CheckpointWritten):
            seen.append(scalar_steps(tmp_path / "run", "train/loss"))

    train(make_config(tensorboard=True), on_event=look)
    assert seen == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]


def test_a_run_killed_before_its_model_was_written_ends_without_another_step(make_config, tmp_path):
    def kill_at_the_last_checkpoint(event):
        if isinstance(event, CheckpointWritten) and event.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(make_config(), on_event=kill_at_the_last_checkpoint)
    steps = []
    result = train(make_config(), on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    assert steps == []
    assert result.steps == 6
    assert result.loss == lines(tmp_path / "run" / "metrics.jsonl")[-1]["loss"]
    assert (tmp_path / "run" / "model" / "mtp" / "heads.safetensors").exists()


def test_the_newest_checkpoint_damaged_means_the_one_before_and_a_warning(make_config, tmp_path):
    train(make_config("straight"))
    train_killed(make_config(), 5)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    notices = []
    result = train(make_config(), on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None)
    assert result.resumed_from_step == 2
    assert any(text.startswith("warning") and "step-00000004" in text for text in notices)
    assert_same_run(tmp_path / "straight", tmp_path / "run", step=6)


def test_a_run_without_a_checkpoint_is_started_again(make_config, tmp_path):
    train_killed(make_config(), 1)
    result = train(make_config())
    assert result.resumed_from_step is None
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_future_tokens": 2}, "num_future_tokens was 3, is 2"),
        ({"hidden_size": 48}, "hidden_size was 32, is 48"),
        ({"family": "mistral"}, "model_type was llama, is mistral"),
        ({"held_out_fraction": 0.5}, "training data changed"),
        ({"split_seed": 1}, "training data changed"),
        ({"sequence_length": 64}, "sequence_length was 48, is 64"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"optimizer": "muon"}, "optimizer was adamw, is muon"),
    ],
)
def test_a_resume_of_another_run_is_refused_and_what_changed_is_named(make_config, overrides, named):
    train_killed(make_config(), 3)
    with pytest.raises(TrainingError, match="cannot resume") as caught:
        train(make_config(**overrides))
    assert named in str(caught.value)


@pytest.mark.parametrize("side", ["training", "held-out"])
def test_a_resume_with_changed_text_is_refused(make_config, tmp_path, side):
    folder = write_corpus(tmp_path / "texts")
    config = make_config(data=[str(folder)])
    train_killed(config, 3)
    held_out = split_by_group(iter_files(folder), held_out_fraction=0.2, seed=0).held_out[0].group
    group = next(path for path in sorted(folder.iterdir()) if (path.name == held_out) == (side == "held-out"))
    (group / "text0.txt").write_text("one word more " + (group / "text0.txt").read_text())
    with pytest.raises(TrainingError, match=f"the {side} data changed"):
        train(config)


def test_a_resume_with_another_tokenizer_is_refused(make_config, tmp_path):
    from headway.data.tokenizers import train_bpe_tokenizer

    train_bpe_tokenizer([b"trunk head token offset draft"], vocabulary_size=260).save_pretrained(tmp_path / "bpe")
    train_killed(make_config(), 3)
    with pytest.raises(TrainingError, match="the tokenizer changed"):
        train(make_config(tokenizer=str(tmp_path / "bpe")))


def test_data_that_only_moved_are_the_same_data(make_config, tmp_path):
    folder = write_corpus(tmp_path / "texts")
    train_killed(make_config(data=[str(folder)]), 3)
    folder.rename(tmp_path / "elsewhere")
    assert train(make_config(data=[str(tmp_path / "elsewhere")])).resumed_from_step == 2


def test_options_that_a_resume_accepts_are_named(make_config):
    train_killed(make_config(), 3)
    notices = []
    train(
        make_config(learning_rate=1e-4, log_every_steps=2, gradient_clip=None),
        on_event=lambda e: notices.append(e.text) if isinstance(e, Notice) else None,
    )
    (told,) = [text for text in notices if "changed options" in text]
    assert "learning_rate: 0.003 -> 0.0001" in told
    assert "gradient_clip: 1.0 -> None" in told
    assert "log_every_steps" not in told


def test_a_finished_run_is_refused_and_overwrite_replaces_it(make_config, tmp_path):
    train(make_config())
    with pytest.raises(TrainingError, match=r"finished run.*--overwrite"):
        train(make_config())
    result = train(make_config(overwrite=True, steps=2))
    assert result.resumed_from_step is None
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_resume_never_refuses_an_unfinished_run(make_config):
    train_killed(make_config(), 3)
    with pytest.raises(TrainingError, match="unfinished run and resume=never"):
        train(make_config(resume="never"))


def test_a_folder_of_somebody_else_is_refused_and_overwrite_keeps_its_files(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    with pytest.raises(TrainingError, match=r"not a run of headway \(thesis.tex\)"):
        train(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    train(make_config(overwrite=True))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "dear"


@pytest.mark.parametrize("name", ["model", "checkpoints", "config.yaml", "tensorboard"])
def test_files_of_somebody_else_under_our_names_are_never_replaced(make_config, tmp_path, name):
    theirs = tmp_path / "run" / name
    theirs.mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match=r"not a run of headway.*choose another"):
            train(make_config(overwrite=overwrite))
    assert theirs.is_dir()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_garbage_after_the_last_checkpoint_of_the_metrics_is_dropped(make_config, tmp_path):
    train_killed(make_config(), 3)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\xff\n[1, 2]\n")
    train(make_config())
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


def test_an_output_that_is_a_file_is_refused(make_config, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TrainingError, match="is a file"):
        train(make_config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(make_config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TrainingError, match="cannot write to the output folder"):
        train(make_config())


def test_two_processes_cannot_train_in_one_folder(make_config):
    with claimed(make_config()), pytest.raises(TrainingError, match="another process is training"):
        train(make_config())
    assert train(make_config()).steps == 6


def test_a_named_checkpoint_starts_a_run_in_another_folder(make_config, tmp_path):
    train(make_config("straight", keep_checkpoints=5))
    source = tmp_path / "straight" / "checkpoints" / "step-00000002"
    result = train(make_config("branch", resume=str(source)))
    assert result.resumed_from_step == 2
    assert_same_weights_and_lines_from(tmp_path / "straight", tmp_path / "branch", first=3)


def assert_same_weights_and_lines_from(left: Path, right: Path, *, first: int) -> None:
    from small_runs import assert_same_tensors, weights

    assert_same_tensors(weights(left / "model"), weights(right / "model"))
    assert lines(left / "metrics.jsonl")[first - 1 :] == lines(right / "metrics.jsonl")


def test_a_named_checkpoint_before_others_of_its_own_run_is_refused(make_config, tmp_path):
    train_killed(make_config(), 5)
    source = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(TrainingError, match="step-00000004"):
        train(make_config(resume=str(source)))
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert train(make_config(resume=str(newest))).resumed_from_step == 4


def test_a_named_checkpoint_that_is_damaged_or_absent_is_refused(make_config, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        train(make_config(resume=str(tmp_path / "absent")))
    train_killed(make_config("other"), 3)
    source = tmp_path / "other" / "checkpoints" / "step-00000002"
    (source / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json is missing"):
        train(make_config(resume=str(source)))


def test_a_checkpoint_copied_elsewhere_serves(make_config, tmp_path):
    train_killed(make_config("other"), 3)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000002", tmp_path / "kept")
    assert train(make_config(resume=str(tmp_path / "kept"))).resumed_from_step == 2


def test_the_state_of_the_data_is_one_integer(make_config, tmp_path):
    train_killed(make_config(gradient_accumulation_steps=2), 3)
    run = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "run.json").read_text())
    assert run["state"]["next_row"] == 2 * 2 * 2
    assert set(run["state"]) == {"step", "next_row", "elapsed_seconds", "skipped_steps", "skipped_in_a_row"}
