import json
import math
import os
import re
import signal

import numpy as np
import pytest
import yaml

from headway.cli.train import _evaluators
from headway.errors import ConfigError, DataError
from headway.training.config import TrainConfig
from headway.training.config_file import read_config_file, resolve_config, to_yaml
from headway.training.estimate import plan_training
from headway.training.events import Notice, StepDone
from headway.training.interruption import TrainingInterruptedError
from headway.training.loop import train
from small_runs import assert_same_run, lines, run_fields


def records(path, count=60):
    path.write_text(
        "".join(
            json.dumps({"q": f"{n} plus {n} is ", "a": f"{2 * n}.", "ok": n % 3 > 0, "text": f"number {n} " * 5}) + "\n"
            for n in range(count)
        )
    )
    return path


@pytest.fixture
def notices():
    return []


def into(notices):
    return lambda event: notices.append(event.text) if isinstance(event, Notice) else None


def test_sources_are_lines_or_mappings_and_come_back_as_lines(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n- text\n- {path: 'a.jsonl', field: body}\n- path: x.bin\n  dtype: uint16\nheld_out: [{path: h}]\n"
    )
    expected = ("text", "a.jsonl::field=body", "x.bin::dtype=uint16")
    assert read_config_file(path) == {"data": expected, "held_out": ("h",)}
    config = TrainConfig(size="1M", data=["text", {"path": "a.jsonl", "field": "body"}], held_out={"path": "h"})
    assert config.data == expected[:2]
    assert config.held_out == ("h",)
    assert resolve_config(config_file=_written(tmp_path / "again.yaml", to_yaml(config))) == config
    assert [spec.path for spec in config.corpus_spec.sources] == ["text", "a.jsonl"]


def _written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ["a::weigth=1"]}, "did you mean 'weight'"),
        ({"data": ["a::weight=1", "b"]}, "every source of a mixture needs a weight"),
        ({"held_out": ["a::weight=1"]}, "held-out text is not mixed"),
        ({"data": [{"paht": "a"}]}, "unknown option 'paht'"),
        ({"data": ["hf:a::streaming=true"]}, "say with take"),
        ({"epochs": 0}, "epochs must be more than 0"),
        ({"loader_workers": -1}, "loader_workers must be at least 0"),
        ({"size": None}, "init_from"),
        ({"init_from": "x"}, "size and init_from both give the model"),
        ({"size": None, "init_from": "x", "initialization": "scaled"}, "init_from=x already decides initialization"),
        ({"size": None, "init_from": "x", "tie_embeddings": True}, "init_from=x already decides tie_embeddings"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_read(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**({"size": "1M"} | fields))


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml: data: unknown option 'paht'"):
        read_config_file(_written(tmp_path / "config.yaml", "data: [{paht: a}]"))


def test_epochs_replace_steps_wherever_they_come_later(tmp_path):
    path = _written(tmp_path / "config.yaml", "size: 1M\nsteps: 7\n")
    assert resolve_config(config_file=path, overrides={"epochs": 2.0}).epochs == 2.0
    again = _written(tmp_path / "epochs.yaml", "size: 1M\nepochs: 2\n")
    assert resolve_config(config_file=again, overrides={"steps": 9}).epochs is None
    # a warm-up is measured against the steps once they are known
    assert TrainConfig(size="1M", epochs=3, warmup_steps=5000).epochs == 3
    plan = plan_training(TrainConfig(size="1M", epochs=3))
    assert (plan.steps, plan.warmup_steps, plan.tokens) == (None, None, None)


@pytest.mark.parametrize("epochs", [1, 2.0, 0.5, 0.001])
def test_a_run_of_epochs_has_the_steps_of_its_text(make_config, tmp_path, notices, epochs):
    result = train(make_config(epochs=epochs, checkpoint_every_steps=None, batch_size=4), on_event=into(notices))
    (described,) = [text for text in notices if " epochs of " in text]
    rows = int(re.search(r"epochs of (\d+) rows", described)[1])
    assert rows > 50
    assert result.steps == max(1, math.ceil(epochs * rows / 4))
    assert described == f"{result.steps} steps of 4 rows: {4 * result.steps / rows:.3g} epochs of {rows} rows"
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (saved["steps"], saved["epochs"]) == (result.steps, None)


def test_a_warm_up_longer_than_the_epochs_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"warmup_steps=9999 and steps=\d+;"):
        train(make_config(epochs=1, warmup_steps=9999))


def test_one_file_trains_with_held_out_text_of_its_own(make_config, corpus, tmp_path, notices):
    (tmp_path / "one.txt").write_text("word after word " * 300)
    with pytest.raises(DataError, match=r"name the held-out text explicitly .held_out"):
        train(make_config("without", data=[str(tmp_path / "one.txt")]))
    config = make_config(
        data=[str(tmp_path / "one.txt")], held_out=[str(corpus / "package1")], eval_every_steps=6, eval_prompts=0
    )
    result = train(config, evaluators=lambda data: _evaluators(config, data), on_event=into(notices))
    assert len(result.evaluation["nats"]) == 3
    assert any(text.startswith("held out: ") for text in notices)


def interrupt_after(step):
    def listen(event):
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_resumes_bit_for_bit_with_any_number_of_workers(make_config, corpus, tmp_path, workers):
    path = records(tmp_path / "r.jsonl")
    data = [f"{corpus}::weight=0.7", f"{path}::weight=0.3"]
    train(make_config("whole", data=data))
    interrupted = make_config("again", data=data, loader_workers=workers)
    with pytest.raises(TrainingInterruptedError):
        train(interrupted, on_event=interrupt_after(3))
    train(interrupted)
    assert_same_run(tmp_path / "whole", tmp_path / "again", step=6)


def test_other_shares_are_another_run(make_config, corpus, tmp_path):
    path = records(tmp_path / "r.jsonl")
    with pytest.raises(TrainingInterruptedError):
        train(make_config(data=[f"{corpus}::weight=1", f"{path}::weight=1"]), on_event=interrupt_after(3))
    with pytest.raises(Exception, match="the training data changed"):
        train(make_config(data=[f"{corpus}::weight=1", f"{path}::weight=2"]))


def test_examples_are_learned_by_their_completions(make_config, tmp_path, notices):
    path = records(tmp_path / "r.jsonl")
    line = f"{path}::prompt=q,completion=a,reward=ok"
    result = train(make_config(data=[line], epochs=3, eval_every_steps=100), on_event=into(notices))
    assert result.loss is not None
    # completions are "N.": with the prompts among its targets the loss would begin near ln 258 and stay
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["loss"] < lines(tmp_path / "run/metrics.jsonl")[0]["loss"]
    prompts_only = _written(tmp_path / "bad.jsonl", json.dumps({"q": "a" * 90, "a": "b"}) + "\n")
    short = train(
        make_config("short", data=[f"{path}::prompt=q,completion=a"], sequence_length=16, held_out_fraction=0.1)
    )
    assert short.steps == 6
    train(
        make_config("cut", data=[f"{prompts_only}::prompt=q,completion=a"], held_out_fraction=0), on_event=into(notices)
    )
    assert notices[-1].endswith("1 examples are longer than sequence_length=48 and cut")


def test_ids_of_another_modality_train_and_are_evaluated(make_config, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "codes.npy", np.cumsum(rng.integers(0, 3, (60, 40)), axis=1) % 100)
    config = make_config(
        data=[str(tmp_path / "codes.npy")],
        tokenizer="integers:100",
        eval_every_steps=3,
        eval_prompts=1,
        eval_prompt_tokens=8,
        eval_new_tokens=8,
        tensorboard=True,
    )
    result = train(config, evaluators=lambda data: _evaluators(config, data))
    assert result.evaluation["bits_per_byte"] is None
    assert len(result.evaluation["nats"]) == 3
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    assert saved["vocab_size"] == 102


def test_run_fields_are_still_those_of_a_plain_run(corpus, tmp_path):
    assert TrainConfig(**run_fields(corpus, tmp_path)).corpus_spec.held_out == ()
