"""Runs with schedules, distilled heads and detached trunks: what happens at which step, and that it resumes exactly."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from headway.data.tokenizers import load_tokenizer
from headway.errors import ConfigError
from headway.losses.weights import WeightPlan
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.events import Notice, StepDone
from headway.training.loop import train
from headway.training.loss_options import weight_plan
from headway.training.metrics import step_scalars
from headway.training.model_building import base_config
from headway.training.parallel import heads_may_rest
from headway.training.rng import preserved_rng, seed_everything
from headway.training.run_files import TOKENS
from headway.training.starting_model import starting_model
from small_runs import assert_same_run, lines, weights


class Killed(BaseException):
    """Ends a run from inside, as a kill does."""


def killed_after(step):
    def listener(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return listener


def starting_weights(config):
    """Of the heads, before the first step."""
    with preserved_rng():
        seed_everything(config.seed)
        return starting_model(config, base_config(config, load_tokenizer("bytes"))).heads.state_dict()


SCHEDULES = {
    "linear": {"weight_schedule": "linear"},
    "sine": {"weight_schedule": "sine", "weight_schedule_fraction": 0.5},
    "step": {"weight_schedule": "step", "head_weight": 0.3, "head_weight_after": 0.1, "normalize_head_weights": True},
    "forward": {"weight_schedule": "forward_curriculum"},
    "reverse": {"weight_schedule": "reverse_curriculum", "optimizer": "muon"},
    "reverse-medusa": {"weight_schedule": "reverse_curriculum", "heads": "medusa"},
    "fade": {"weight_schedule": "fade", "head_weight_decay": 0.5},
    "later-tokens": {"weight_schedule": "fade", "num_future_tokens": 1, "later_token_weights": [0.5, 0.25]},
    "distilled": {"objective": "hybrid", "cross_entropy_share": 0.1, "weight_schedule": "forward_curriculum"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_killed_in_the_middle_of_a_schedule_continues_bit_for_bit(make_config, tmp_path, name):
    train(make_config("straight", **SCHEDULES[name]))
    with pytest.raises(Killed):
        train(make_config("killed", **SCHEDULES[name]), on_event=killed_after(3))
    assert train(make_config("killed", **SCHEDULES[name])).resumed_from_step == 2
    assert_same_run(tmp_path / "straight", tmp_path / "killed", step=6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_line_of_metrics_has_the_weights_of_its_step_and_nothing_of_offsets_without_one(
    make_config, tmp_path, name
):
    config = make_config("run", **SCHEDULES[name])
    train(config)
    plan = weight_plan(config)
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        wanted = plan.at(record["step"])
        assert record["offset_weights"] == list(wanted)
        trained = record["objective_per_offset"] or record["loss_per_offset"]
        assert [nats is None for nats in record["loss_per_offset"]] == [weight == 0 for weight in wanted]
        assert [share is None for share in record["accuracy_per_offset"]] == [weight == 0 for weight in wanted]
        total = sum(weight * value for weight, value in zip(wanted, trained, strict=True) if weight)
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert f"train/loss_offset_{1 + wanted.count(0.0)}" in step_scalars(record) or 0.0 in wanted


def test_a_curriculum_switches_at_the_step_it_says(make_config, tmp_path):
    said = []
    config = make_config("run", weight_schedule="forward_curriculum", steps=7, checkpoint_every_steps=None)
    train(config, on_event=lambda event: said.append(event.text) if isinstance(event, Notice) else None)
    assert "loss weights: forward_curriculum, trained offsets: 1 from step 1, 2 from step 4, 3 from step 6" in said
    active = [
        sum(nats is not None for nats in record["loss_per_offset"]) for record in lines(tmp_path / "run/metrics.jsonl")
    ]
    assert active == [1, 1, 1, 2, 2, 3, 3]


def test_heads_that_rest_keep_their_weights_and_get_moments_only_when_they_are_trained(make_config, tmp_path):
    config = make_config(
        "run", weight_schedule="forward_curriculum", steps=6, checkpoint_every_steps=1, keep_checkpoints=10
    )
    train(config)
    first = starting_weights(config)
    for step in range(1, 7):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        heads = load_file(folder / "model" / "mtp" / "heads.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        for index, begins in ((0, 3), (1, 5)):  # offset 2 from step 3, offset 3 from step 5
            name = f"{index}.mlp.up_proj.weight"
            assert torch.equal(heads[name], first[name]) == (step < begins)  # neither trained nor decayed
            assert (f"exp_avg/heads.{name}" in moments) == (step >= begins)
            if step >= begins:
                assert moments[f"step/heads.{name}"].item() == step - begins + 1  # Adam's own correction starts then


def test_heads_that_are_dropped_stay_as_they_were_and_so_do_their_moments(make_config, tmp_path):
    config = make_config(
        "run", weight_schedule="reverse_curriculum", steps=6, checkpoint_every_steps=1, keep_checkpoints=10
    )
    train(config)
    states = []
    for step in (2, 3, 6):  # offset 3 is dropped at step 3
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        heads = load_file(folder / "model" / "mtp" / "heads.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        name = "1.mlp.up_proj.weight"
        states.append((heads[name], moments[f"exp_avg/heads.{name}"], moments[f"step/heads.{name}"]))
    for dropped in states[1:]:
        assert all(torch.equal(former, later) for former, later in zip(states[0], dropped, strict=True))


@pytest.mark.parametrize(
    "objective", ["kl", "reverse_kl", "total_variation", "log_acceptance", "hybrid", "cross_entropy"]
)
def test_every_objective_trains_its_heads_and_lowers_its_own_loss(make_config, tmp_path, objective):
    config = make_config("run", objective=objective, steps=12, checkpoint_every_steps=None, learning_rate=1e-2)
    result = train(config)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    trained = [record["objective_per_offset"] or record["loss_per_offset"] for record in records]
    assert sum(trained[-1][1:]) != sum(trained[0][1:])
    assert (records[0]["objective_per_offset"] is None) == (objective == "cross_entropy")
    assert result.loss == pytest.approx(sum(trained[-1]), rel=1e-5)
    first, last = starting_weights(config), weights(tmp_path / "run" / "model")
    assert all(not torch.equal(first[name], last[f"heads.{name}"]) for name in first)


def test_a_teacher_from_a_folder_teaches_and_is_not_saved(make_config, tmp_path):
    train(make_config("teacher", num_future_tokens=1))
    folder = str(tmp_path / "teacher" / "model")
    config = make_config("student", objective="kl", teacher=folder, distill_next_token=True, seed=1)
    train(config)
    records = lines(tmp_path / "student" / "metrics.jsonl")
    assert all(value is not None for record in records for value in record["objective_per_offset"])
    own = make_config("own", objective="kl", seed=1)
    train(own)
    assert records[0]["loss"] != lines(tmp_path / "own" / "metrics.jsonl")[0]["loss"]
    assert not any("teacher" in name for name in weights(tmp_path / "student" / "model"))
    # of another width, with another tokenizer: refused before the first step
    with pytest.raises(ConfigError, match="choose a teacher with the run's tokenizer"):
        train(make_config("other", objective="kl", teacher=folder, tokenizer="integers:300"))
    with pytest.raises(ConfigError, match="name a folder or a hub name"):
        train(make_config("none", objective="kl", teacher=str(tmp_path / "nothing")))


def test_a_teacher_that_cannot_be_had_is_refused_before_any_text_is_read(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher=nobody/nothing cannot be loaded: .*the hub cannot be reached"):
        train(make_config("run", objective="kl", teacher="nobody/nothing"))
    assert not (tmp_path / "run" / TOKENS).exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_a_detached_trunk_the_base_trains_as_the_plain_model_does(make_config, tmp_path, optimizer):
    common = {"gradient_clip": None, "optimizer": optimizer, "shorten_trunk": False}  # clipping sees all gradients
    train(make_config("detached", detach_trunk="on", **common))
    train(make_config("plain", num_future_tokens=1, **common))
    detached, plain = weights(tmp_path / "detached/model"), weights(tmp_path / "plain/model")
    for name, tensor in plain.items():
        torch.testing.assert_close(detached[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(name.startswith("heads.") for name in detached)


def test_scoring_later_tokens_leaves_a_plain_model(make_config, tmp_path):
    config = make_config("run", num_future_tokens=1, later_token_weights=[0.5, 0.25], weight_schedule="fade")
    train(config)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [len(record["loss_per_offset"]) for record in records] == [3] * 6
    assert records[-1]["offset_weights"] == [1.0, 0.0, 0.0]
    model = MultiTokenLM.from_pretrained(tmp_path / "run" / "model")
    assert model.num_future_tokens == 1
    assert model.mtp_config.offset_weights is None
    assert not load_file(tmp_path / "run" / "model" / "mtp" / "heads.safetensors")


def test_weights_at_full_strength_are_saved_for_whoever_trains_on(make_config, tmp_path):
    train(make_config("run", head_weight_decay=0.5, weight_schedule="linear", steps=1, checkpoint_every_steps=None))
    assert MultiTokenLM.from_pretrained(tmp_path / "run" / "model").mtp_config.offset_weights == (1.0, 0.5, 0.25)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"offset_weights": [1.0, 1.0, 1.0], "head_weight_decay": 0.8}, ["offset_weights", "head_weight_decay"]),
        ({"later_token_weights": [0.5]}, ["later_token_weights", "num_future_tokens"]),
        ({"weight_schedule": "step"}, ["weight_schedule", "head_weight_after"]),
        ({"head_weight_after": 0.1}, ["weight_schedule", "head_weight_after"]),
        ({"weight_schedule": "step", "head_weight_after": 0.1, "head_weight": 0.0}, ["head_weight=0", "linear"]),
        ({"weight_schedule": "linear", "weight_schedule_fraction": 1.5}, ["weight_schedule_fraction", "up to 1"]),
        ({"weight_schedule": "linear", "num_future_tokens": 1}, ["weight_schedule", "num_future_tokens"]),
        ({"detach_trunk": "on", "num_future_tokens": 1}, ["detach_trunk", "num_future_tokens"]),
        ({"detach_trunk": "on", "wiring": "anticausal"}, ["detach_trunk", "wiring"]),
        ({"offset_weights": [0.0, 0.0, 0.0]}, ["offset_weights", "raise one"]),
        ({"num_future_tokens": 1, "later_token_weights": [1.0] * 47}, ["sequence_length", "48 offsets"]),
        ({"teacher": "somewhere"}, ["teacher", "objective"]),
        ({"objective": "kl", "distill_next_token": True}, ["distill_next_token", "teacher"]),
        ({"objective": "kl", "num_future_tokens": 1}, ["objective", "num_future_tokens"]),
        ({"cross_entropy_share": 0.5}, ["cross_entropy_share", "kl"]),
    ],
)
def test_options_that_exclude_each_other_name_both_and_the_way_out(make_config, fields, names):
    with pytest.raises(ConfigError) as error:
        make_config(**fields)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("fields", "rests"),
    [
        ({}, False),
        ({"weight_schedule": "linear", "head_weight_decay": 0.5}, False),
        ({"weight_schedule": "forward_curriculum"}, True),
        ({"head_weight": 0.0}, True),
        ({"offset_weights": [1.0, 0.0, 1.0]}, True),
        ({"weight_schedule": "step", "head_weight_after": 0.0}, True),
        ({"weight_schedule": "fade", "num_future_tokens": 1, "later_token_weights": [0.5]}, False),
    ],
)
def test_ddp_is_told_to_look_for_unused_parameters_only_where_heads_may_rest(make_config, fields, rests):
    assert heads_may_rest(make_config(**fields)) == rests


def test_the_schedule_of_a_run_counted_in_epochs_ends_with_it(make_config):
    config = make_config("run", weight_schedule="linear", weight_schedule_fraction=0.5, steps=6)
    assert weight_plan(config) == WeightPlan(weights=(1.0,) * 3, schedule="linear", steps=3)
