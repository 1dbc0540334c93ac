import json

import pytest

from headway.errors import ConfigError, TrainingError
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.best import Figure, best_of, parse_figure, read_best
from headway.training.checkpoint import checkpoint_paths, read_checkpoint
from headway.training.events import StepDone
from headway.training.loop import train
from small_runs import assert_same_tensors, weights

NATS = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.0, 6: 4.0}


def scripted(model, step):
    return {"nats": [NATS[step], 9.0 - step], "accuracy": [0.1 * step]}


class Killed(BaseException):
    """Ends a run from inside, as a kill does."""


def killed_after(step):
    def listener(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return listener


def names(folder):
    return [path.name for path in checkpoint_paths(folder / "checkpoints")]


def evaluated(make_config, output="run", **overrides):
    return make_config(output, **({"eval_every_steps": 1, "keep_checkpoints": 1} | overrides))


def test_the_best_and_the_newest_are_kept_and_which_is_best_is_recorded(make_config, tmp_path):
    result = train(evaluated(make_config, checkpoint_every_steps=3), evaluators=[scripted])
    assert names(tmp_path / "run") == ["step-00000002", "step-00000006"]
    recorded = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    # step 5 is as good: of equal ones the earlier stays
    assert recorded == {
        "checkpoint": "step-00000002",
        "step": 2,
        "value": 3.0,
        "figure": "nats",
        "offset": 1,
        "lower_is_better": True,
    }
    assert result.best == recorded


def test_the_best_has_a_plain_model_folder_under_a_name_that_stays(make_config, tmp_path):
    train(evaluated(make_config), evaluators=[scripted])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert MultiTokenLM.from_pretrained(checkpoints / "best" / "model").num_future_tokens == 3
    assert_same_tensors(weights(checkpoints / "best" / "model"), weights(checkpoints / "step-00000002" / "model"))


@pytest.mark.parametrize(
    ("figure", "step"),
    [("nats:2", 6), ("accuracy", 6), ("nats:1", 2)],
    ids=["offset 2", "higher is better", "offset 1"],
)
def test_another_figure_may_decide(make_config, tmp_path, figure, step):
    result = train(evaluated(make_config, keep_best=figure), evaluators=[scripted])
    assert result.best is not None
    assert result.best["step"] == step


def test_none_keeps_only_the_newest(make_config, tmp_path):
    result = train(evaluated(make_config, keep_best=None), evaluators=[scripted])
    assert names(tmp_path / "run") == ["step-00000006"]
    assert result.best is None
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_a_killed_run_keeps_the_best_of_all_its_evaluations(make_config, tmp_path):
    config = evaluated(make_config, checkpoint_every_steps=2)
    for step in (3, 4, 6):
        with pytest.raises(Killed):
            train(config, evaluators=[scripted], on_event=killed_after(step))
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    train(config, evaluators=[scripted])
    assert names(tmp_path / "run") == ["step-00000002", "step-00000006"]
    assert read_best(tmp_path / "run" / "checkpoints")["step"] == 2


def test_a_run_branches_from_the_best_of_another(make_config, tmp_path):
    train(evaluated(make_config, "first"), evaluators=[scripted])
    best = tmp_path / "first" / "checkpoints" / "best"
    result = train(make_config("second", resume=str(best)))
    assert result.resumed_from_step == 2
    with pytest.raises(TrainingError, match="finished run"):
        train(make_config("first", resume=str(best)))
    (tmp_path / "first" / "result.json").unlink()
    with pytest.raises(TrainingError, match=r"step-00000006\).*choose another --output"):
        train(make_config("first", resume=str(best)))


def test_going_back_to_the_best_of_the_same_run_is_possible_once_the_later_ones_are_gone(make_config, tmp_path):
    import shutil

    train(evaluated(make_config), evaluators=[scripted])
    (tmp_path / "run" / "result.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    result = train(evaluated(make_config, resume=str(checkpoints / "best")), evaluators=[scripted])
    assert result.resumed_from_step == 2
    assert read_checkpoint(checkpoints / "step-00000006").state.step == 6


def test_a_figure_that_no_evaluation_gives_is_named_with_those_there_are(make_config):
    with pytest.raises(TrainingError, match=r"keep_best=accuracies .*\(nats, accuracy\)"):
        train(evaluated(make_config, keep_best="accuracies"), evaluators=[scripted])


def test_evaluations_without_the_default_figure_rank_nothing(make_config):
    assert train(evaluated(make_config), evaluators=[lambda model, step: {"other": 1.0}]).best is None


def test_figures_that_are_not_numbers_are_never_the_best():
    lines = [{"step": 1, "nats": [None]}, {"step": 2, "nats": [float("nan")]}, {"step": 3, "nats": [7.0]}]
    best = best_of(lines, Figure("nats"))
    assert best is not None
    assert best.step == 3
    assert best_of(lines, Figure("nats", offset=2)) is None


def test_an_offset_means_the_same_where_a_figure_begins_with_offset_2():
    lines = [
        {"step": 1, "walk_acceptance_rate": [0.9, 0.1], "accuracy": [0.1, 0.9]},
        {"step": 2, "walk_acceptance_rate": [0.1, 0.9], "accuracy": [0.9, 0.1]},
    ]
    found = {}
    for name in ("walk_acceptance_rate", "walk_acceptance_rate:2", "walk_acceptance_rate:3", "accuracy:2", "accuracy"):
        best = best_of(lines, parse_figure(name))
        assert best is not None
        found[name] = (best.step, best.offset, best.value)
    assert found == {
        "walk_acceptance_rate": (1, 2, 0.9),
        "walk_acceptance_rate:2": (1, 2, 0.9),
        "walk_acceptance_rate:3": (2, 3, 0.9),
        "accuracy:2": (1, 2, 0.9),
        "accuracy": (2, 1, 0.9),
    }


def test_an_offset_that_the_model_does_not_predict_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"keep_best=nats:4 asks for offset 4, .*num_future_tokens=3"):
        make_config(keep_best="nats:4")
    with pytest.raises(ConfigError, match="keep_best=walk_acceptance_rate asks for offset 2"):
        make_config(keep_best="walk_acceptance_rate", num_future_tokens=1)


@pytest.mark.parametrize("text", ["", ":2", "nats:", "nats:0", "nats:two", "walk_acceptance_rate:1"])
def test_a_figure_spelt_wrong_is_refused(text):
    with pytest.raises(ConfigError, match="keep_best takes a figure"):
        parse_figure(text)
