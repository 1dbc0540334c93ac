"""W&B and trackio, by stand-ins that write down what they are told: one tracked run, nothing twice, nothing missing."""

import json
import sys
from types import SimpleNamespace

import pytest

from headway.cli.main import main
from headway.errors import TrainingError
from headway.training.events import CheckpointWritten, Notice, StepDone
from headway.training.loop import train
from headway.training.tracking import Tracker


class Killed(BaseException):
    """Ends a run from inside, as a kill does."""


class Recorder:
    """What a tracker's server would hold: runs by id, and the calls that made them."""

    def __init__(self, name):
        self.name, self.inits, self.rows, self.axes, self.finished = name, [], {}, [], 0
        self.fails_at = None

    def module(self):
        if self.name == "wandb":
            return SimpleNamespace(init=self.init_wandb)
        return SimpleNamespace(init=self.init_trackio, log=self.log_trackio, finish=self.finish)

    def init_wandb(self, **options):
        sys.stdout.write("wandb: something for a person\n")
        self.inits.append(options)
        return SimpleNamespace(
            log=lambda values: self.log(options["id"], values.pop("step"), values),
            finish=self.finish,
            define_metric=lambda name, **axis: self.axes.append((name, axis)),
        )

    def init_trackio(self, **options):
        sys.stdout.write("* trackio: something for a person\n")
        self.inits.append(options)

    def log_trackio(self, values, *, step):
        self.log(self.inits[-1]["name"], step, values)

    def log(self, run, step, values):
        if self.fails_at == step:
            raise ConnectionError("no route\nto host")
        self.rows.setdefault(run, []).append((step, dict(values)))

    def finish(self):
        self.finished += 1

    @property
    def only_run(self):
        assert len(self.rows) == 1
        return next(iter(self.rows.values()))


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    recorder = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, recorder.module())
    return recorder


def evaluate(model, step):
    return {"nats": [1.0, 2.0], "step_squared": step * step}


def killed_after(step):
    def listener(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return listener


def steps_of(rows, name):
    return [step for step, values in rows if name in values]


def test_the_tracker_hears_what_the_files_hold(make_config, tmp_path, tracker):
    config = make_config(track=tracker.name, track_project="mine", eval_every_steps=3)
    train(config, evaluators=[evaluate])
    rows = tracker.only_run
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(rows, "train/loss") == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [values["train/loss_offset_3"] for _, values in rows if "train/loss" in values] == [
        line["loss_per_offset"][2] for line in lines
    ]
    assert steps_of(rows, "evaluation/nats/offset_2") == [3, 6]
    told = tracker.inits[0]
    assert told["project"] == "mine"
    assert told["resume"] == "allow"
    assert told["config"] == config.to_dict()
    assert tracker.finished == 1
    if tracker.name == "wandb":
        # W&B drops what comes late on its own axis; ours is a metric like the others
        assert tracker.axes == [("step", {}), ("*", {"step_metric": "step"})]
        assert told["settings"] == {"console": "off", "save_code": False}
        assert told["dir"] == str(tmp_path / "run")


@pytest.mark.parametrize("kills", [[5], [3, 5]])
def test_a_resumed_run_goes_on_in_the_same_tracked_run_and_tells_nothing_twice(make_config, tmp_path, tracker, kills):
    config = make_config(track=tracker.name, eval_every_steps=2)
    for step in kills:
        with pytest.raises(Killed):
            train(config, evaluators=[evaluate], on_event=killed_after(step))
    train(config, evaluators=[evaluate])
    assert len(tracker.inits) == len(kills) + 1
    rows = tracker.only_run
    assert steps_of(rows, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(rows, "evaluation/nats/offset_1") == [2, 4, 6]
    identifier = json.loads((tmp_path / "run" / "tracking.json").read_text())[tracker.name]
    assert list(tracker.rows) == [identifier]
    assert identifier.startswith("run-")


def test_a_tracker_that_joins_a_resumed_run_hears_first_of_what_is_past(make_config, tracker):
    with pytest.raises(Killed):
        train(make_config(eval_every_steps=2), evaluators=[evaluate], on_event=killed_after(5))
    train(make_config(eval_every_steps=2, track=tracker.name), evaluators=[evaluate])
    assert steps_of(tracker.only_run, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(tracker.only_run, "evaluation/step_squared") == [2, 4, 6]


def test_a_run_that_is_overwritten_is_another_tracked_run(make_config, tracker):
    train(make_config(track=tracker.name, steps=2))
    train(make_config(track=tracker.name, steps=2, overwrite=True))
    assert len(tracker.rows) == 2


def test_a_tracker_that_fails_while_the_run_goes_on_costs_one_warning(make_config, tmp_path, tracker):
    tracker.fails_at = 3
    said = []
    train(make_config(track=tracker.name), on_event=lambda event: said.append(event))
    warnings = [event.text for event in said if isinstance(event, Notice) and tracker.name in event.text]
    assert warnings == [
        f"warning: {tracker.name} did not take the figures of step 3: no route to host; metrics.jsonl has them, further "
        "failures are silent"
    ]
    assert steps_of(tracker.only_run, "train/loss") == [1, 2, 4, 5, 6]
    assert any(isinstance(event, CheckpointWritten) and event.step == 6 for event in said)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_stdout_belongs_to_the_document_of_the_run(tmp_path, tracker, capsys):
    Tracker(tracker.name, folder=tmp_path, project="mine", options={}).close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "something for a person" in captured.err


def test_a_tracker_that_cannot_start_is_one_sentence_with_the_way_out(tmp_path, tracker, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api key\nnot configured")

    monkeypatch.setitem(sys.modules, tracker.name, SimpleNamespace(init=refuse))
    with pytest.raises(TrainingError, match=f"{tracker.name} could not start a run: api key not configured; .*--track"):
        Tracker(tracker.name, folder=tmp_path, project="mine", options={})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    corpus, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails, installed or not
    options = [
        "--hidden-size",
        "32",
        "--num-layers",
        "4",
        "--num-heads",
        "2",
        "--steps",
        "2",
        "--sequence-length",
        "48",
    ]
    command = ["train", "--data", str(corpus), "--output", str(tmp_path / "run"), "--track", name, *options]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"track={name} needs the package {name}, which is not installed" in error
    assert f"pip install {name}" in error


def test_nothing_is_imported_that_was_not_asked_for(make_config, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(make_config(steps=2)).steps == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"wandb": 3}'])
def test_a_damaged_list_of_ids_starts_another_tracked_run_or_reads_what_it_can(tmp_path, monkeypatch, content):
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder.module())
    (tmp_path / "tracking.json").write_text(content)
    Tracker("wandb", folder=tmp_path, project="mine", options={}).log(1, {"a": 1.0})
    assert recorder.only_run == [(1, {"a": 1.0})]
