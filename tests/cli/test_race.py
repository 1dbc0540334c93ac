"""`headway race`: the same text twice, identical, with a speed-up that was measured."""

import json
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
