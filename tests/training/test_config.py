import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError
from headway.training.config import TrainConfig
from headway.training.config_file import (
    from_mapping,
    read_config_file,
    recipe_names,
    resolve_config,
    to_yaml,
)
from headway.training.fields import field_specs, parse_text

MODEL = {"hidden_size": 32, "num_layers": 4, "num_heads": 2}


def config(**fields):
    return TrainConfig(**(MODEL | fields))


def yaml_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


texts = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(texts, min_size=1, max_size=3),
    learning_rate=st.floats(1e-9, 10, allow_nan=False),
    weights=st.none() | st.lists(st.floats(0, 5), min_size=3, max_size=3).filter(any),
    compile_mode=st.sampled_from(["auto", "on", "off"]),
    clip=st.none() | st.floats(1e-3, 10),
    overwrite=st.booleans(),
    output=texts,
)
def test_yaml_round_trip_gives_an_equal_configuration(
    tmp_path_factory, data, learning_rate, weights, compile_mode, clip, overwrite, output
):
    original = config(
        num_future_tokens=3,
        data=tuple(data),
        learning_rate=learning_rate,
        offset_weights=weights,
        compile=compile_mode,
        gradient_clip=clip,
        overwrite=overwrite,
        output=output,
    )
    path = yaml_file(tmp_path_factory.mktemp("yaml"), to_yaml(original))
    assert resolve_config(config_file=path) == original


def test_every_field_has_help_and_a_readable_default():
    for name, spec in field_specs(TrainConfig).items():
        assert spec.help.endswith("."), name
        assert spec.group, name


def test_dict_round_trip_gives_an_equal_configuration():
    original = config(offset_weights=(1.0, 0.5, 0.25, 0.0), betas=(0.8, 0.9))
    assert from_mapping(original.to_dict(), source="test") == original


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        read_config_file(yaml_file(tmp_path, "learning_rat: 1.0"))


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'steps' stands twice"):
        read_config_file(yaml_file(tmp_path, "steps: 1\nseed: 1\nsteps: 2"))


@pytest.mark.parametrize("text", ["- steps", "steps: [", "just text", "steps: {a: 1}"])
def test_a_file_that_is_no_configuration_is_refused_with_its_name(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config_file(yaml_file(tmp_path, text))


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_config_file(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read|not valid YAML"):
        read_config_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 2.0),
        ("steps", True),
        ("steps", "many"),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
        ("overwrite", 1),
        ("optimizer", "sgd"),
        ("output", 3),
        ("betas", [0.9]),
        ("betas", [0.9, 0.95, 0.99]),
        ("data", 3),
        ("data", [3]),
        ("seed", None),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_field_name(field, value):
    with pytest.raises(ConfigError, match=field):
        config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("held_out_fraction", 1.0),
        ("keep_checkpoints", 0),
        ("gradient_clip", 0.0),
        ("offset_weights", (1.0, -1.0, 1.0, 1.0)),
    ],
)
def test_a_number_outside_its_range_is_refused_with_field_and_limit(field, value):
    with pytest.raises(ConfigError, match=rf"{field} must be (at least|more than|less than)"):
        config(**{field: value})


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    # YAML 1.1 reads 3e-4 as text; nobody who writes it means text.
    assert read_config_file(yaml_file(tmp_path, "learning_rate: 3e-4"))["learning_rate"] == 3e-4


def test_yaml_on_and_off_are_words_where_words_are_asked_for(tmp_path):
    assert read_config_file(yaml_file(tmp_path, "compile: on"))["compile"] == "on"
    assert read_config_file(yaml_file(tmp_path, "compile: off"))["compile"] == "off"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"size": "10M"}, ["size", "hidden_size"]),
        ({"hidden_size": None, "num_layers": None, "num_heads": None}, ["size", "base_config", "hidden_size"]),
        ({"num_heads": None}, ["hidden_size", "num_heads"]),
        ({"num_heads": 3}, ["hidden_size", "num_heads"]),
        ({"num_kv_heads": 3, "num_heads": 4}, ["num_heads", "num_kv_heads"]),
        ({"num_future_tokens": 5}, ["num_future_tokens", "num_layers"]),
        ({"offset_weights": (1.0,)}, ["offset_weights", "num_future_tokens"]),
        ({"sequence_length": 4}, ["sequence_length", "num_future_tokens"]),
        ({"max_positions": 8}, ["max_positions", "sequence_length"]),
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, ["warmup_steps", "warmup_fraction"]),
        ({"warmup_steps": 10, "steps": 10}, ["warmup_steps", "steps"]),
        ({"adamw_learning_rate": 1e-3}, ["adamw_learning_rate", "optimizer"]),
        ({"overwrite": True, "resume": "some/checkpoint"}, ["overwrite", "resume"]),
        ({"held_out_fraction": 0.0}, ["eval_every_steps", "held_out_fraction"]),
        (
            {"hidden_size": None, "num_layers": None, "num_heads": None, "base_config": "x", "tie_embeddings": True},
            ["base_config", "tie_embeddings"],
        ),
    ],
)
def test_fields_that_exclude_each_other_are_both_named(fields, names):
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    for name in names:
        assert name in str(caught.value)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_configuration_of_its_own_folder(name):
    recipe = resolve_config(recipe=name)
    assert recipe.output == f"out/{name}"


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown recipe 'tiny-byte'; did you mean 'tiny-bytes'"):
        resolve_config(recipe="tiny-byte")


def test_overrides_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = yaml_file(tmp_path, "steps: 77\nseed: 5")
    resolved = resolve_config(recipe="tiny-bytes", config_file=path, overrides={"seed": 6})
    assert (resolved.steps, resolved.seed) == (77, 6)
    assert resolved.hidden_size == resolve_config(recipe="tiny-bytes").hidden_size


def test_a_later_way_to_give_the_model_replaces_an_earlier_one():
    resolved = resolve_config(recipe="tiny-bytes", overrides={"size": "1M", "warmup_steps": 9})
    assert (resolved.size, resolved.hidden_size, resolved.total_warmup_steps) == ("1M", None, 9)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("12", "steps", 12),
        ("1e-3", "learning_rate", 1e-3),
        ("none", "gradient_clip", None),
        ("0.9,0.99", "betas", (0.9, 0.99)),
        ("muon", "optimizer", "muon"),
    ],
)
def test_words_of_a_command_line_become_typed_values(text, field, value):
    spec = field_specs(TrainConfig)[field]
    assert parse_text(text, spec.annotation, where=spec.flag) == value


@pytest.mark.parametrize(
    ("text", "field"), [("none", "steps"), ("1.5", "steps"), ("fast", "learning_rate"), ("1", "betas")]
)
def test_words_that_do_not_fit_are_refused_with_the_flag(text, field):
    spec = field_specs(TrainConfig)[field]
    with pytest.raises(ConfigError, match=spec.flag):
        parse_text(text, spec.annotation, where=spec.flag)


def test_reading_a_configuration_loads_neither_torch_nor_transformers():
    code = (
        "import sys; import headway.training.config_file as c; c.resolve_config(recipe='tiny-bytes');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_path_object_serves_as_a_path_text():
    assert config(output=Path("a") / "b").output == str(Path("a") / "b")
