import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headway.errors import ConfigError, DataError, TrainingError
from headway.model.multi_token_lm import MultiTokenLM
from headway.training import step as step_module
from headway.training.events import EvaluationDone, Notice, RunEnded, RunStarted, StepDone
from headway.training.loop import train
from headway.training.run_directory import RESULT
from small_runs import assert_same_run, assert_same_tensors, lines, weights


def collect(kind, into):
    return lambda event: into.append(event) if isinstance(event, kind) else None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(make_config, tmp_path, optimizer):
    for output in ("first", "second"):
        train(make_config(output, optimizer=optimizer))
    assert_same_run(tmp_path / "first", tmp_path / "second", step=6)


def test_another_seed_gives_other_weights_and_another_order(make_config, tmp_path):
    for seed in (0, 1):
        train(make_config(f"seed{seed}", seed=seed))
    first, second = (weights(tmp_path / f"seed{seed}" / "model") for seed in (0, 1))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_evaluations_change_neither_the_curve_nor_the_weights(make_config, tmp_path, with_dropout):
    def disturbing(model, step):
        assert not model.training
        assert not torch.is_grad_enabled()
        random.random()
        np.random.rand(3)
        torch.rand(3)
        return {"draw": 0.5}

    train(make_config("without", **with_dropout))
    train(make_config("with", eval_every_steps=1, **with_dropout), evaluators=[disturbing])
    assert_same_tensors(weights(tmp_path / "without" / "model"), weights(tmp_path / "with" / "model"))
    assert lines(tmp_path / "without" / "metrics.jsonl") == lines(tmp_path / "with" / "metrics.jsonl")
    assert len(lines(tmp_path / "with" / "evaluations.jsonl")) == 6


def test_training_lowers_the_loss_of_every_offset(make_config, tmp_path):
    train(make_config(steps=60, learning_rate=1e-2, checkpoint_every_steps=None))
    curve = lines(tmp_path / "run" / "metrics.jsonl")
    for offset in range(3):
        assert curve[-1]["loss_per_offset"][offset] < 0.75 * curve[0]["loss_per_offset"][offset]


def test_evaluators_run_every_so_many_steps_and_after_the_last(make_config):
    events = []
    result = train(
        make_config(eval_every_steps=4),
        evaluators=[lambda model, step: {"a": float(step)}, lambda model, step: {"b": [step]}],
        on_event=collect(EvaluationDone, events),
    )
    assert [event.step for event in events] == [4, 6]
    assert result.evaluation["a"] == 6.0
    assert result.evaluation["b"] == [6]


def test_evaluators_can_be_made_from_the_data(make_config):
    seen = []

    def factory(data):
        seen.append((data.train.num_tokens, data.held_out.num_tokens, data.tokenizer.eos_token_id))
        return [lambda model, step: {"x": 1}]

    train(make_config(eval_every_steps=6), evaluators=factory)
    ((train_tokens, held_out_tokens, eos),) = seen
    assert train_tokens > held_out_tokens > 0
    assert eos == 256


def test_the_result_is_a_model_that_both_libraries_load(make_config, tmp_path):
    result = train(make_config())
    model = MultiTokenLM.from_pretrained(result.model_directory)
    assert model.num_future_tokens == 3
    assert len(model.heads) == 2
    plain = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert plain.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(result.model_directory)
    assert tokenizer.decode(tokenizer("trunk")["input_ids"]) == "trunk"
    assert json.loads((tmp_path / "run" / RESULT).read_text())["loss_per_offset"] == list(result.loss_per_offset)
    assert result.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_events_tell_the_run_from_start_to_end(make_config):
    events = []
    train(make_config(), on_event=events.append)
    kinds = [type(event).__name__ for event in events if not isinstance(event, Notice)]
    step_and_save = ["StepDone", "StepDone", "CheckpointWritten"]
    assert kinds == ["RunStarted", *step_and_save * 3, "RunEnded"]
    started = next(event for event in events if isinstance(event, RunStarted))
    assert (started.first_step, started.steps, started.tokens_per_step, started.num_future_tokens) == (1, 6, 96, 3)
    assert events[-1] == RunEnded(finished=True)


def test_every_so_many_steps_and_the_last_are_logged(make_config, tmp_path):
    events = []
    train(make_config(log_every_steps=4), on_event=collect(StepDone, events))
    assert [event.step for event in events] == list(range(1, 7))
    assert [event.step for event in events if event.logged] == [4, 6]
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [4, 6]


def test_the_callers_random_states_and_threads_are_left_alone(make_config):
    torch.manual_seed(5)
    random.seed(5)
    expected = (random.random(), torch.rand(1))
    torch.manual_seed(5)
    random.seed(5)
    threads = torch.get_num_threads()
    train(make_config(threads=1))
    assert torch.get_num_threads() == threads
    assert (random.random(), torch.rand(1)) == expected


def break_steps(monkeypatch, broken):
    """Make the forward of the given steps return an infinite loss."""
    real, calls = step_module.optimizer_step, []

    def step(model, optimizer, batches, **options):
        calls.append(1)
        if len(calls) in broken:
            hook = model.heads[0].register_forward_hook(lambda module, args, output: output * float("inf"))
            try:
                return real(model, optimizer, batches, **options)
            finally:
                hook.remove()
        return real(model, optimizer, batches, **options)

    monkeypatch.setattr("headway.training.run.optimizer_step", step)


def test_a_non_finite_step_is_skipped_counted_and_told(make_config, tmp_path, monkeypatch):
    break_steps(monkeypatch, {2, 5})
    notices = []
    result = train(make_config(max_nonfinite_steps=2), on_event=collect(Notice, notices))
    assert result.skipped_steps == 2
    told = [notice.text for notice in notices if "skipped" in notice.text]
    assert told == [f"warning: step {step} skipped: its loss is not finite" for step in (2, 5)]
    curve = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["applied"] for line in curve] == [True, False, True, True, False, True]
    assert curve[1]["loss"] is None
    assert curve[1]["loss_per_offset"] is None


def test_too_many_non_finite_steps_in_a_row_stop_the_run(make_config, tmp_path, monkeypatch):
    break_steps(monkeypatch, {3, 4, 5})
    with pytest.raises(TrainingError, match=r"3 steps in a row.*max_nonfinite_steps=3.*lower learning_rate"):
        train(make_config(max_nonfinite_steps=3))
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert train(make_config(learning_rate=1e-4)).steps == 6


def test_a_model_that_cannot_be_built_is_refused_before_the_text_is_read(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown size '10K'.*10M"):
        train(make_config(size="10K", hidden_size=None, num_layers=None, num_heads=None, data=["absent"]))


def test_text_that_is_not_there_is_refused(make_config):
    with pytest.raises(DataError, match="absent"):
        train(make_config(data=["absent"]))


def test_a_device_that_is_not_there_is_refused(make_config):
    with pytest.raises(ConfigError, match="device=warp"):
        train(make_config(device="warp"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda is not there"):
            train(make_config(device="cuda"))


def test_runs_share_a_token_cache_on_request(make_config, tmp_path):
    caches = tmp_path / "caches"
    for output in ("first", "second"):
        train(make_config(output, cache_directory=str(caches)))
        assert not (tmp_path / output / "tokens").exists()
    assert len(list(caches.iterdir())) == 2


def test_the_plain_model_is_trained_with_one_future_token(make_config, tmp_path):
    result = train(make_config(num_future_tokens=1))
    assert len(result.loss_per_offset) == 1
    assert result.loss == pytest.approx(result.loss_per_offset[0])


def test_nothing_held_out_means_nothing_to_evaluate(make_config):
    seen = []
    train(make_config(held_out_fraction=0.0), evaluators=lambda data: seen.append(data.held_out) or [])
    assert seen == [None]
