"""`headway train --dry-run` and `--list-recipes`: what they show, and what they refuse."""

import json

import pytest

from headway.cli.main import main as headway
from headway.training.config_file import recipe_names

TINY = ["--hidden-size", "64", "--num-layers", "5", "--num-heads", "2", "--sequence-length", "64", "--batch-size", "4"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, str]:
    """The JSON document and the text for a person."""
    assert headway(["train", *arguments]) == 0
    output = capsys.readouterr()
    return json.loads(output.out.splitlines()[-1]), output.err


def test_a_plan_for_several_devices_shows_every_way_and_how_long_it_takes(capsys):
    found, text = shown(
        capsys, *TINY, "--dry-run", "--processes", "4", "--parallel", "fsdp", "--on", "A100", "--precision", "bfloat16"
    )
    assert found["plan"]["processes"] == 4
    assert [way["parallel"] for way in found["plan"]["layouts"]] == ["none", "none", "ddp", "ddp", "fsdp", "fsdp"]
    assert found["plan"]["memory"] == found["plan"]["layouts"][4]["memory"]
    assert found["device"]["name"] == "A100"
    assert found["time"]["seconds"] == pytest.approx(
        found["time"]["compute_seconds"] + found["time"]["optimizer_seconds"]
    )
    for words in ("each of 4 devices, fsdp", "fits", "x 4 processes x", "312 TFLOP/s (data sheet)", "40% of that"):
        assert words in text


def test_a_plan_without_a_device_measures_this_machine(capsys):
    found, text = shown(capsys, *TINY, "--dry-run")
    assert found["device"]["measured"] is True
    assert "(measured)" in text
    assert [way["processes"] for way in found["plan"]["layouts"]] == [1, 1]


def test_all_recipes_are_listed_with_what_they_train(capsys):
    found, text = shown(capsys, "--list-recipes")
    assert list(found["recipes"]) == recipe_names()
    assert all(name in text for name in recipe_names())


@pytest.mark.parametrize("option", [["--processes", "2"], ["--on", "H100"]])
def test_options_of_a_plan_are_refused_without_one(capsys, option):
    assert headway(["train", *TINY, *option]) == 2
    assert f"{option[0]} is for a plan: pass --dry-run" in capsys.readouterr().err


def test_a_device_that_nobody_knows_is_answered_with_the_nearest(capsys):
    assert headway(["train", *TINY, "--dry-run", "--on", "H10O"]) == 2
    assert "did you mean 'H100'?" in capsys.readouterr().err


def test_a_recipe_of_the_paper_is_planned_without_its_text(capsys):
    found, _ = shown(capsys, "--recipe", "gloeckle-induction-1m", "--dry-run", "--on", "H100")
    assert found["config"]["size"] == "1M"
    assert found["plan"]["tokens_per_step"] == 2**18
