"""`headway calibrate`: measures, shows, stores, and its tree is used where it was measured."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import pytest

from headway.cli.calibrate import drawn_tree
from headway.decoding.calibration.stored import CALIBRATION_FILE
from headway.functional.tree import Tree


class Run(NamedTuple):
    """What a command left."""

    status: int
    stdout: str
    stderr: str


QUICK = ("--windows", 2, "--prompt-tokens", 8, "--new-tokens", 24, "--max-nodes", 4, "--ranks", 3, "--rounds", 1)


@pytest.fixture
def folder(constant_folder, tmp_path):
    """A model whose drafts are all right, in a folder that may be written."""
    return shutil.copytree(constant_folder, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a quick brown fox jumps over the lazy dog and goes on with its way.\n" * 3)
    return path


def test_calibrate_measures_shows_stores_and_draws(headway, folder, text, tmp_path):
    plot = tmp_path / "plot.svg"
    run = Run(*headway("calibrate", folder, text, *QUICK, "--keep-loops", "--lookup", "--plot", plot))
    assert run.status == 0, run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["stored"] is True
    # A gpt_neox has no lean form: what is stored is what really ran.
    assert document["machine"]["executor"] == "eager"
    assert document["report"]["accuracy"][0][0] == pytest.approx(1.0)
    # Only first candidates are ever right, so there is nothing to branch for.
    assert document["report"]["trees"] == []
    assert document["report"]["chains"][-1]["tokens_per_forward"] == pytest.approx(4.0, rel=0.25)
    for words in (
        "accuracy where all earlier offsets are right",
        "cost of a forward",
        "expected",
        "chosen:",
    ):
        assert words in run.stderr
    assert "2 continuations loop, which is easy to draft for: counted as asked" in run.stderr
    assert plot.read_text().startswith("<svg")
    stored = json.loads((folder / CALIBRATION_FILE).read_text())
    assert [entry["tree"] for entry in stored["entries"]] == [document["tree"]]
    assert headway("calibrate", folder, text, *QUICK, "--plot", plot)[0] == 2

    made = Run(*headway("generate", folder, "aaaa", "--max-new-tokens", 12, "--tree", "calibrated", "--json"))
    assert made.status == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["text"] == "a" * 12


def test_a_dry_run_stores_nothing_and_generate_then_says_what_to_run(headway, folder, text):
    run = Run(*headway("calibrate", folder, text, *QUICK, "--dry-run", "--executor", "eager", "--against", "text"))
    assert run.status == 0, run.stderr
    assert "nothing was stored" in run.stderr
    assert not (folder / CALIBRATION_FILE).exists()
    made = Run(*headway("generate", folder, "aaaa", "--max-new-tokens", 4, "--tree", "calibrated"))
    assert made.status == 2
    assert "headway calibrate" in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1


def test_drafts_from_a_file_of_tokens_change_nothing_in_the_text(headway, folder, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([ord("a"), ord("b")]))
    made = Run(*headway("generate", folder, "aaaa", "--max-new-tokens", 8, "--draft-vocabulary", ids, "--json"))
    assert made.status == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["text"] == "a" * 8
    ids.write_text('{"a": 1}')
    refused = Run(*headway("generate", folder, "aaaa", "--draft-vocabulary", ids))
    assert refused.status == 2
    assert "JSON list of token ids" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--draft-vocabularies", "x"), "sizes separated by commas"),
        (("--new-tokens", 100), "do not fit into the 64"),
        (("--new-tokens", 2), "before a draft could be seen whole"),
        ((), "all 2 continuations loop"),
        (("--against", "text", "--temperature", 1), "leave it out"),
    ],
)
def test_what_cannot_be_measured_is_one_line(headway, folder, text, flags, message):
    run = Run(*headway("calibrate", folder, text, *QUICK, *flags))
    assert run.status == 2
    assert message in run.stderr


def test_a_plain_folder_has_nothing_to_calibrate(headway, plain_folder, text):
    run = Run(*headway("calibrate", plain_folder, text))
    assert run.status == 2
    assert "has no heads" in run.stderr


def test_a_tree_is_drawn_with_its_ranks():
    assert drawn_tree(Tree.chain(0)) == []
    assert drawn_tree(Tree.from_choices([(0,), (2,), (0, 1)])) == ["*", "|- 0", "|  `- 1", "`- 2"]
