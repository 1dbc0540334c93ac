"""`headway bench`: one command, every arm, one document."""

import json
from pathlib import Path

import pytest

SMALL = ("--num-prompts", "2", "--prompt-tokens", "16", "--max-new-tokens", "12", "--rounds", "1", "--warmup", "0")


def document(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_bytes(b"def add(left, right):\n    return left + right\n" * 3)
    return file


def test_a_benchmark_ends_with_one_document_and_leaves_a_page(headway, byte_folder: Path, text: Path, tmp_path: Path):
    folder = tmp_path / "out"
    status, out, err = headway("bench", byte_folder, "--prompts", text, "--output", folder, "--batch", "1,2", *SMALL)
    found = document(out)
    assert status == 0
    assert out.count("\n") == 1
    assert found["equal"] is True
    assert found["setting"]["prompts"] == "text.py"
    assert found["setting"]["num_prompts"] == 2
    arms = {figures["arm"] for figures in found["batches"][0]["arms"]}
    assert {"plain", "chain-3", "tree", "lookup", "heads+lookup", "plain/lean", "tree/lean", "hf", "hf-static"} <= arms
    assert "over the fastest plain engine" in err
    assert "skipped hf-assisted: no assistant" in err
    assert json.loads((folder / "bench.json").read_text()) == found
    assert (folder / "bench.html").is_file()
    assert headway("bench", byte_folder, "--prompts", text, "--output", folder, *SMALL)[0] == 2


def test_texts_that_loop_give_no_headline(headway, constant_folder: Path, text: Path):
    options = ("--arms", "plain,chain-3,hf", "--max-new-tokens", "24")
    status, out, err = headway("bench", constant_folder, "--prompts", text, *SMALL, *options)
    batch = document(out)["batches"][0]
    chain = next(figures for figures in batch["arms"] if figures["arm"] == "chain-3")
    assert status == 0
    assert (batch["looping_rows"], batch["rows"], batch["headline"]) == (2, 2, None)
    assert chain["all_texts"]["tokens_per_forward"] > 3.5
    assert chain["texts_without_loops"] is None
    assert "no headline: every call holds a text that loops" in err
    assert "skipped plain/lean, chain-3/lean: no lean executor: the lean block is written for" in err


def test_an_assistant_and_a_plain_folder(headway, plain_folder: Path, text: Path):
    options = ("--arms", "plain,chain,hf-assisted", "--executors", "eager", "--assistant", plain_folder)
    status, out, err = headway("bench", plain_folder, "--prompts", text, *SMALL, *options)
    assisted = document(out)["batches"][0]["arms"][1]
    assert status == 0
    assert (assisted["arm"], assisted["differing_rows"]) == ("hf-assisted", 0)
    assert assisted["all_texts"]["tokens_per_forward"] > 1  # it drafts for itself
    assert "skipped chain: the model has no heads" in err


def test_a_greedy_text_that_differs_is_status_1(headway, byte_folder: Path, text: Path, monkeypatch):
    from headway.experiments.bench import other_engines

    whole = other_engines.until_end
    monkeypatch.setattr(other_engines, "until_end", lambda tokens, ends: [tokens[0] ^ 1, *whole(tokens, ends)[1:]])
    options = ("--arms", "plain,hf", "--executors", "eager")
    status, out, err = headway("bench", byte_folder, "--prompts", text, *SMALL, *options)
    arm = document(out)["batches"][0]["arms"][1]
    assert status == 1
    assert arm["differing_rows"] == 2
    assert arm["unexplained_differences"] == 2
    assert "2 rows differ, gap" in err
    assert "generate (whose text differs): plain" in err


def test_drawn_texts_are_the_same_under_every_draft(headway, byte_folder: Path, text: Path):
    options = ("--arms", "plain,chain-3,lookup,hf,hf-static", "--temperature", "1.3", "--seed", "5")
    status, out, err = headway("bench", byte_folder, "--prompts", text, *SMALL, *options)
    found = document(out)
    compared = {figures["arm"]: figures["differing_rows"] for figures in found["batches"][0]["arms"]}
    assert status == 0
    assert compared == {"plain": 0, "chain-3": 0, "lookup": 0, "plain/lean": 0, "chain-3/lean": 0, "lookup/lean": 0} | {
        "hf": None,
        "hf-static": None,
    }
    assert (found["setting"]["temperature"], found["setting"]["seed"]) == (1.3, 5)
    assert err.count("drawn anew") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "plain,chians"], "there is no arm 'chians'"),
        (["--arms", "chain"], "keep 'plain' among --arms"),
        (["--executors", "fast"], "there is no executor 'fast'"),
        (["--batch", "1,x"], "--batch takes whole numbers"),
        (["--batch", "0"], "at least 1"),
        (["--prompt-tokens", "60", "--max-new-tokens", "60"], "do not fit"),
        (["--prompts", "nowhere.txt"], "check --prompts"),
        (["--tree", "x"], "--tree takes a number of nodes"),
    ],
)
def test_mistakes_are_one_line(headway, byte_folder: Path, options: list[str], said: str):
    status, out, err = headway("bench", byte_folder, *options)
    assert status == 2
    assert out == ""
    assert said in err.splitlines()[-1]
