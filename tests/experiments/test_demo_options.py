from pathlib import Path

import pytest

from headway.errors import ConfigError
from headway.experiments.demo import options as demo_options
from headway.experiments.demo.options import RECIPE, DemoOptions
from headway.training.config_file import resolve_config


def test_only_the_demos_own_folders_are_replaced_without_being_asked():
    assert DemoOptions().may_replace_demo
    assert DemoOptions(quick=True).may_replace_demo
    assert not DemoOptions(output=Path("mine")).may_replace_demo
    assert DemoOptions(output=Path("mine"), overwrite=True).may_replace_demo


def test_a_quick_look_does_not_replace_a_real_demo():
    assert DemoOptions(quick=True).folder != DemoOptions().folder


def test_the_demo_trains_the_recipe_that_ships():
    config = DemoOptions(seed=3, threads=2).training_config()
    recipe = resolve_config(recipe=RECIPE)
    assert config.num_future_tokens == 4
    assert config.tokenizer == "bytes"
    assert config.data == ("stdlib",)
    for name in ("hidden_size", "num_layers", "sequence_length", "batch_size", "steps", "optimizer", "learning_rate"):
        assert getattr(config, name) == getattr(recipe, name), name
    assert (config.seed, config.threads) == (3, 2)
    assert Path(config.output) == Path("out/demo/training")


def test_steps_reach_the_run_and_quick_keeps_the_number_of_future_tokens():
    assert DemoOptions(steps=7).training_config().steps == 7
    quick = DemoOptions(quick=True, steps=5).training_config()
    assert quick.steps == 5
    assert quick.num_future_tokens == 4


def test_without_fast_bfloat16_the_demo_trains_in_float32(monkeypatch):
    monkeypatch.setattr(demo_options, "has_fast_bfloat16", lambda: False)
    assert DemoOptions().training_config().precision == "float32"


@pytest.mark.parametrize("options", [{"steps": 0}, {"threads": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="at least"):
        DemoOptions(**options)
