"""`headway race`: the same text twice, identical, with a speed-up that was measured."""

import json
import shutil
from pathlib import Path

import pytest

from headway.cli.live_race import Lane


def document(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_race_ends_with_identical_and_the_speedup(headway, constant_folder: Path):
    status, out, err = headway("race", constant_folder, "x", "--max-new-tokens", "17")
    figures = document(out)
    assert status == 0
    assert figures["identical"] is True
    assert figures["new_tokens"] == 17
    assert figures["tokens_per_forward"] == 4
    assert err.splitlines()[-1].startswith("identical: yes, x")
    assert len(figures["plain_tokens_per_second_rounds"]) == len(figures["self_speculative_tokens_per_second_rounds"])


def test_both_panes_show_which_forward_gave_what(headway, constant_folder: Path):
    err = headway("race", constant_folder, "x", "--max-new-tokens", "9")[2]
    assert "prefill + 8 forward passes" in err
    assert "prefill + 2 forward passes" in err
    assert err.count("\u2502aaaa\u2502aaaa") == 1


def test_a_prompt_is_a_file_where_one_is_there(headway, byte_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert document(headway("race", byte_folder, "text", "--max-new-tokens", "3")[1])["prompt_tokens"] == 4
    Path("text").write_bytes(b"seven b")
    assert document(headway("race", byte_folder, "text", "--max-new-tokens", "3")[1])["prompt_tokens"] == 7
    assert document(headway("race", byte_folder, "x" * 50, "--max-new-tokens", "3")[1])["prompt_tokens"] == 50


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        ("plain_folder", [], "has no heads"),
        ("byte_folder", ["--num-draft-tokens", "9"], "must be at most 3"),
    ],
)
def test_races_that_cannot_be_are_one_line(headway, request, folder: str, options: list[str], said: str):
    status, out, err = headway("race", request.getfixturevalue(folder), "x", *options)
    assert status == 2
    assert out == ""
    assert said in err.splitlines()[-1]


def test_the_lane_that_is_behind_goes_next(monkeypatch):
    from headway.cli import live_race

    lanes = [Lane("a", None, None, seconds=2.0), Lane("b", None, None, seconds=1.0)]  # type: ignore[arg-type]
    assert live_race._next_lane(lanes) is lanes[1]
    lanes[1].finished = True
    assert live_race._next_lane(lanes) is lanes[0]


@pytest.fixture
def as_reference(byte_folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A random model in the place of the reference model, in a repository of its own."""
    from headway.experiments.reference import place

    folder = tmp_path / "reference" / "model"
    shutil.copytree(byte_folder, folder)
    (folder / "reference.json").write_text(json.dumps({"data": {"held_out_packages": ["logging", "enum"]}}))
    monkeypatch.setattr(place, "checkout", lambda: tmp_path)
    return folder


def test_without_a_model_the_reference_model_races_on_a_function_it_has_never_seen(headway, as_reference, monkeypatch):
    monkeypatch.setattr("headway.cli.reference_race.PROMPT_BYTES", 24)
    status, out, err = headway("race", "--max-new-tokens", "12")
    assert status == 0
    assert "the reference model continues logging/__init__.py, which it has never seen" in err
    assert document(out)["identical"] is True
    assert (document(out)["prompt_tokens"], document(out)["new_tokens"]) == (24, 12)
    assert err.splitlines()[-1].startswith("identical: yes, x")


def test_the_demo_opens_with_the_race_and_goes_on_where_there_is_none(
    as_reference, tmp_path: Path, monkeypatch, capsys
):
    from headway.cli import reference_race
    from headway.cli.console import human_console

    monkeypatch.setattr(reference_race, "PROMPT_BYTES", 24)
    monkeypatch.setattr(reference_race, "NEW_TOKENS", 8)
    race = reference_race.opening_race(human_console(), threads=1)
    assert race is not None
    assert race["identical"] is True
    (as_reference / "reference.json").unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert reference_race.opening_race(human_console(), threads=1) is None
    assert capsys.readouterr().err.startswith("the reference model is not here")


def test_an_installed_package_says_in_one_line_where_the_reference_model_is(headway, tmp_path: Path, monkeypatch):
    from headway.experiments.reference import place

    monkeypatch.setattr(place, "checkout", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, err = headway("race")
    assert (status, out) == (2, "")
    assert "part of headway's repository (reference/model)" in err.splitlines()[-1]
