"""`MultiTokenTrainer`: the Hugging Face Trainer with the loss and the logs of every offset."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer

from headway.errors import ConfigError
from headway.losses.objective import TrainingObjective
from headway.model.lora import lora_module_names
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.hugging_face import MultiTokenTrainer
from tiny_models import tiny_base, tiny_model
from trainer_cases import copy_of_state, logged, pad, rows, trainer

OFFSETS = range(1, 5)


def reference(model, data) -> tuple[float, list[float]]:
    """The library's own loss of all rows at once, and its parts."""
    with torch.no_grad():
        output = model(**pad(data))
    return float(output.loss), output.loss_per_offset.tolist()


@pytest.mark.parametrize(("micro", "accumulated"), [(4, 1), (1, 4), (2, 2)])
def test_a_steps_loss_is_the_mean_of_each_offset_over_all_its_micro_batches(tmp_path, micro, accumulated):
    model = tiny_model(offset_weights=(1.0, 0.5, 0.25, 2.0))
    data = rows(4, ragged=True)
    expected, per_offset = reference(model, data)
    trained = trainer(
        model,
        tmp_path,
        kind=MultiTokenTrainer,
        train_dataset=data,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        max_steps=2,
    )
    trained.train()
    assert logged(trained)[0] == pytest.approx(expected, rel=1e-5)
    for offset in OFFSETS:
        assert logged(trained, f"loss_offset_{offset}")[0] == pytest.approx(per_offset[offset - 1], rel=1e-5)
    assert len(logged(trained, "loss_offset_4")) == 2


def test_gradients_are_those_of_the_whole_step(tmp_path):
    data = rows(8, ragged=True)
    states = []
    for micro, accumulated in ((4, 1), (1, 4)):
        model = tiny_model()
        trainer(
            model,
            tmp_path,
            kind=MultiTokenTrainer,
            train_dataset=data,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_steps=3,
        ).train()
        states.append(copy_of_state(model))
    assert max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0]) < 2e-6


def test_a_log_is_the_mean_since_the_last_one(tmp_path):
    trained = trainer(tiny_model(), tmp_path, kind=MultiTokenTrainer, max_steps=4, logging_steps=1)
    trained.train()
    rare = trainer(tiny_model(), tmp_path, kind=MultiTokenTrainer, max_steps=4, logging_steps=4)
    rare.train()
    assert logged(rare, "loss_offset_2") == pytest.approx([float(np.mean(logged(trained, "loss_offset_2")))])


def test_evaluation_reports_every_offset_and_predicts_plain_logits(tmp_path):
    model = tiny_model()
    data = rows(6, ragged=True)
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    evaluator = trainer(
        model,
        tmp_path,
        kind=MultiTokenTrainer,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=2,
    )
    metrics = evaluator.evaluate()
    _, per_offset = reference(model, data)
    for offset in OFFSETS:
        assert metrics[f"eval_loss_offset_{offset}"] == pytest.approx(per_offset[offset - 1], rel=1e-5)
    assert shapes == [(6, max(len(row["input_ids"]) for row in data), 40)]
    assert set(evaluator.predict(data).metrics) >= {"test_loss", "test_loss_offset_3"}


def test_the_loss_of_a_later_offset_can_choose_the_best_model(tmp_path):
    trained = trainer(
        tiny_model(),
        tmp_path,
        kind=MultiTokenTrainer,
        eval_dataset=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss_offset_3",
        greater_is_better=False,
    )
    trained.train()
    assert trained.state.best_metric == min(logged(trained, "eval_loss_offset_3"))


def test_packed_documents_are_counted_as_the_model_sees_them(tmp_path):
    data = rows(6, ragged=True)
    for row in data:
        row["labels"] = list(row["input_ids"])
    model = tiny_model()
    _, per_offset = reference(model, data)
    trained = trainer(
        model,
        tmp_path,
        kind=MultiTokenTrainer,
        train_dataset=data,
        data_collator=DataCollatorWithFlattening(),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trained.train()
    assert [logged(trained, f"loss_offset_{offset}")[0] for offset in OFFSETS] == pytest.approx(per_offset, rel=1e-5)


def test_an_offset_without_a_target_is_left_out(tmp_path):
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]} for _ in range(4)]
    trained = trainer(tiny_model(), tmp_path, kind=MultiTokenTrainer, train_dataset=data, max_steps=1)
    trained.train()
    assert logged(trained, "loss_offset_2")
    assert not logged(trained, "loss_offset_3")


def test_a_model_inside_peft_is_found_and_a_plain_one_refused(tmp_path):
    model = tiny_model()
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **lora_module_names(model)))
    trained = trainer(wrapped, tmp_path, kind=MultiTokenTrainer, max_steps=2)
    trained.train()
    assert len(logged(trained, "loss_offset_4")) == 2
    with pytest.raises(ConfigError, match="attach_heads"):
        trainer(tiny_base("llama"), tmp_path, kind=MultiTokenTrainer)


PROCESS = """
import json, sys
from pathlib import Path
from headway.training.hugging_face import MultiTokenTrainer
from transformers import Trainer
from tiny_models import tiny_model
from trainer_cases import logged, rows, trainer
report = {}
for kind in (Trainer, MultiTokenTrainer):
    folder = Path(sys.argv[1]) / kind.__name__
    trained = trainer(tiny_model(), folder, kind=kind, train_dataset=rows(8, ragged=True), eval_dataset=rows(4),
                      per_device_train_batch_size=1, gradient_accumulation_steps=2, per_device_eval_batch_size=2,
                      optim="sgd", max_steps=2, ddp_backend="gloo")
    trained.train()
    metrics = trained.evaluate()
    trained.save_model(str(folder))
    names = ("loss", "loss_offset_1", "loss_offset_4")
    report[kind.__name__] = {"logged": {name: logged(trained, name) for name in names}, "metrics": metrics}
if trained.is_world_process_zero():
    print(json.dumps(report))
"""


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    for kind in (Trainer, MultiTokenTrainer):
        printed = report[kind.__name__]
        model = tiny_model()
        alone = trainer(
            model,
            tmp_path / "alone",
            kind=kind,
            train_dataset=rows(8, ragged=True),
            eval_dataset=rows(4),
            optim="sgd",
            max_steps=2,
        )
        alone.train()
        metrics = alone.evaluate()
        for name, values in printed["logged"].items():
            assert values == pytest.approx(logged(alone, name), rel=1e-4)
        for name in [name for name in metrics if "loss" in name]:
            assert printed["metrics"][name] == pytest.approx(metrics[name], rel=1e-4)
        state = copy_of_state(model)
        saved = MultiTokenLM.from_pretrained(tmp_path / kind.__name__).state_dict()
        assert max(float((state[name] - saved[name]).abs().max()) for name in state) < 2e-6


def test_an_objective_set_on_the_model_is_what_the_trainer_trains(tmp_path):
    data, model = rows(4, ragged=True), tiny_model(offset_weights=(1.0, 0.5, 0.0, 0.0))
    model.train_towards(TrainingObjective(divergence="kl"), teacher=tiny_base("llama", seed=7))
    with torch.no_grad():
        expected = model(**pad(data))
    trained = trainer(
        model, tmp_path, kind=MultiTokenTrainer, train_dataset=data, per_device_train_batch_size=4, max_steps=1
    )
    trained.train()
    assert logged(trained)[0] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert logged(trained, "loss_offset_2")[0] == pytest.approx(expected.loss_per_offset[1].item(), rel=1e-5)
    assert logged(trained, "loss_offset_3") == []  # without a weight it is not computed, and not reported
    assert trained.evaluate(data)["eval_loss_offset_2"] > 0
