"""Runs with an auxiliary objective or on drafts: they train, resume bit for bit, and leave a model that decodes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import headway.decoding.engine  # noqa: F401  (registers the engine)
from headway.errors import ConfigError, TrainingError
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.estimate import plan_training
from headway.training.events import StepDone
from headway.training.flops import training_flops_per_token
from headway.training.loop import train
from headway.training.progress import step_line
from headway.training.standing import Standing
from small_runs import assert_same_run, lines, weights

CASES = {
    "top": {"auxiliary": "top", "order_window": 8},
    "top-plain-model": {"auxiliary": "top", "num_future_tokens": 1},
    "mutor": {"auxiliary": "mutor", "register_distance": 3},
    "mutor-accumulated-muon": {
        "auxiliary": "mutor",
        "gradient_accumulation_steps": 2,
        "optimizer": "muon",
        "precision": "bfloat16",
    },
    "drafts": {"heads": "sequential", "fuse_layers": True, "num_layers": 6, "train_on_drafts": True},
}


class Killed(BaseException):
    """Ends a run from inside, as a kill does: nothing after it runs but `finally`."""


def killed_after_step_5(event):
    if isinstance(event, StepDone) and event.step == 5:
        raise Killed


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_continues_bit_for_bit(name, make_config, tmp_path):
    train(make_config("straight", **CASES[name]))
    with pytest.raises(Killed):
        train(make_config("killed", **CASES[name]), on_event=killed_after_step_5)
    result = train(make_config("killed", **CASES[name]))
    assert result.resumed_from_step == 4
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=6)


@pytest.mark.parametrize("objective", ["top", "mutor"])
def test_its_loss_falls_is_logged_and_its_weights_are_in_the_checkpoints(objective, make_config, tmp_path):
    config = make_config("run", auxiliary=objective, steps=20, learning_rate=1e-2, batch_size=4)
    result = train(config)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["auxiliary_loss"] < records[0]["auxiliary_loss"] - 0.5
    weight = 1.0 if objective == "top" else 0.3
    for record in records:
        assert record["loss"] == pytest.approx(
            sum(record["loss_per_offset"]) + weight * record["auxiliary_loss"], rel=1e-5
        )
    names = [key for key in weights(result.model_directory) if "auxiliary" in key]
    assert names == ["heads.auxiliary." + ("to_scores.weight" if objective == "top" else "embedding.weight")]
    model = MultiTokenLM.from_pretrained(result.model_directory)
    prompt = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(0))
    plain = model.generate(prompt, max_new_tokens=8, num_draft_tokens=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=8), plain)
    base = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert not [key for key in base.state_dict() if "auxiliary" in key]


def test_a_run_without_one_logs_none(make_config, tmp_path):
    train(make_config("run", steps=2))
    assert [record["auxiliary_loss"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [None, None]


def test_a_finished_model_trains_on_without_its_objective_or_with_another(make_config, tmp_path):
    first = train(make_config("first", auxiliary="top"))
    kept = weights(first.model_directory)
    for number, objective in enumerate(("none", "top", "mutor")):
        shape = dict.fromkeys(("hidden_size", "num_layers", "num_heads"))
        config = make_config(
            f"then{number}", init_from=str(first.model_directory), auxiliary=objective, steps=1, **shape
        )
        found = weights(train(config).model_directory)
        assert {key for key in found if "auxiliary" in key} == (
            {"heads.auxiliary.to_scores.weight"}
            if objective == "top"
            else {"heads.auxiliary.embedding.weight"}
            if objective == "mutor"
            else set()
        )
        assert {key for key in kept if "auxiliary" not in key} == {key for key in found if "auxiliary" not in key}


def test_a_run_is_not_resumed_with_another_objective(make_config):
    with pytest.raises(Killed):
        train(make_config("run", auxiliary="top"), on_event=killed_after_step_5)
    with pytest.raises(TrainingError, match="auxiliary was top, is none"):
        train(make_config("run"))


def test_a_plan_counts_what_the_objective_adds(make_config):
    plain, order, registers = (plan_training(make_config("run", auxiliary=name)) for name in ("none", "top", "mutor"))
    assert order.total_parameters - plain.total_parameters == 258 * 32
    assert registers.total_parameters - plain.total_parameters == 32
    assert order.memory.loss > plain.memory.loss
    assert registers.memory.activations > 1.2 * plain.memory.activations
    drafts = {"heads": "sequential", "num_layers": 6}
    alone, own = (plan_training(make_config("run", train_on_drafts=on, **drafts)) for on in (False, True))
    assert own.memory.activations > alone.memory.activations


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"train_on_drafts": True}, "hydra or sequential"),
        ({"train_on_drafts": True, "heads": "hydra", "num_future_tokens": 1}, "num_future_tokens=1"),
        ({"order_window": 3}, "only top"),
        ({"auxiliary": "top", "register_distance": 2}, "only mutor"),
        ({"auxiliary_weight": 1.0}, "auxiliary='none'"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_a_run(fields, match, make_config):
    with pytest.raises(ConfigError, match=match):
        make_config("run", **fields)


def test_operations_count_the_order_and_the_registers():
    shape = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
    counts = []
    for objective in ("none", "top", "mutor"):
        with torch.device("meta"):
            model = MultiTokenLM.from_config(shape, MultiTokenConfig(num_future_tokens=3, auxiliary=objective))
        counts.append(training_flops_per_token(model, sequence_length=48))
    # forward and backward, two operations for each weight of the unembedding
    assert counts[1] - counts[0] == 6 * 40 * 32
    assert 1.3 * counts[0] < counts[2] < 2 * counts[0]


def test_a_line_of_progress_shows_it_and_no_sum_that_is_not_one(make_config):
    seen = []
    train(make_config("run", auxiliary="top", steps=2), on_event=seen.append)
    standing = Standing()
    for event in seen:
        standing.take(event)
    line = step_line(standing)
    assert "auxiliary " in line
    assert " = " not in line
