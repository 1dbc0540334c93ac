"""`headway convert`: one line when it cannot, one JSON document when it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import meta_llama
from headway.cli.main import main
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens, tiny_base, tiny_model


def convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    status = main(["convert", *arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert len(printed.out.splitlines()) == 1
    return json.loads(printed.out), printed.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["convert", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


def test_a_facebook_folder_is_imported_verified_and_reported(tmp_path: Path, capsys):
    meta_llama.write_folder(tmp_path / "7B_4")
    (tmp_path / "7B_4" / "LICENSE").write_text("x")
    (tmp_path / "7B_4" / "train.log").write_text("x")
    document, shown = convert(
        capsys, str(tmp_path / "7B_4"), str(tmp_path / "out"), "--from", "facebook", "--to", "headway", "--verify"
    )
    assert (document["source_format"], document["target_format"]) == ("facebook", "headway")
    assert (document["source_num_future_tokens"], document["num_future_tokens"]) == (4, 4)
    assert document["num_base_tensors"] + document["num_head_tensors"] == 30 + 27
    verification = document["verification"]
    assert len(verification["max_abs_difference"]) == 4
    assert max(verification["max_abs_difference"]) <= 1e-5
    assert verification["missing"] == verification["random"] == verification["unchanged"] == []
    assert document["provenance"]["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(document)
    for words in (
        "facebook -> headway",
        "57 tensors bit for bit",
        "LICENSE",
        "train.log",
        "note: params.json does not",
    ):
        assert words in shown
    assert MultiTokenLM.from_pretrained(tmp_path / "out").num_future_tokens == 4


def test_options_reach_the_conversion(tmp_path: Path, capsys):
    tiny_base("llama").save_pretrained(tmp_path / "plain")
    options = (
        "--from",
        "hf",
        "--to",
        "headway",
        "-n",
        "3",
        "--head-init",
        "fresh",
        "--seed",
        "7",
        "--dtype",
        "bfloat16",
    )
    document, shown = convert(capsys, str(tmp_path / "plain"), str(tmp_path / "heads"), *options, "--verify")
    assert document["dtype"] == "bfloat16"
    assert document["verification"]["max_abs_difference"] == [0.0, None, None]
    assert "offset 2 (9 tensors), offset 3 (9 tensors)" in shown
    assert "drawn at random (seed 7)" in shown
    options = ("--from", "headway", "--to", "headway", "--num-future-tokens", "1", "--overwrite")
    (tmp_path / "target").mkdir()
    tiny_base("llama").save_pretrained(tmp_path / "target")
    document, _ = convert(capsys, str(tmp_path / "heads"), str(tmp_path / "target"), *options)
    assert document["num_head_tensors"] == 0
    assert document["verification"] is None


def test_heads_alone_find_their_base(tmp_path: Path, capsys):
    model = tiny_model(num_future_tokens=3)
    model.base.save_pretrained(tmp_path / "base")
    model.save_heads(tmp_path / "heads")
    source, base, target = (str(tmp_path / name) for name in ("heads", "base", "whole"))
    convert(capsys, source, target, "--from", "headway", "--to", "headway", "--base", base)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        found = MultiTokenLM.from_pretrained(target)(tokens, return_future_logits=True).future_logits
        assert torch.equal(found, model(tokens, return_future_logits=True).future_logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--from", "hf", "--to", "headway"], "there is no model folder a"),
        (["plain", "b", "--from", "hf", "--to", "headway"], "--num-future-tokens 4"),
        (["plain", "b", "--from", "headway", "--to", "hf"], "it looks like --from hf"),
        (["plain", "plain", "--from", "hf", "--to", "hf"], "one folder"),
        (["plain", "b", "--from", "hf", "--to", "hf", "-n", "2"], "holds no heads"),
        (["plain", "b", "--from", "gguf", "--to", "hf"], "'gguf' is not one of"),
        (["plain", "b", "--from", "hf"], "'--to'"),
        (["plain", "b", "--from", "hf", "--to", "hf", "--base", "plain"], "leave it out with --from hf"),
        (["plain", "taken", "--from", "hf", "--to", "hf"], "--overwrite"),
        (["qwen3", "b", "--from", "hf", "--to", "facebook"], "--to headway"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(arguments, message, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_base("llama").save_pretrained("plain")
    tiny_base("llama").save_pretrained("taken")
    tiny_base("qwen3").save_pretrained("qwen3")
    assert message in refused(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "qwen3", "taken"]


def test_a_plain_model_gets_the_heads_that_were_asked_for(tmp_path: Path, capsys):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    source, to_headway = str(tmp_path / "a"), ("--from", "hf", "--to", "headway", "-n", "3")
    document, shown = convert(
        capsys,
        source,
        str(tmp_path / "b"),
        *to_headway,
        "--heads",
        "medusa",
        "--head-option",
        "blocks_per_head=2",
        "--head-option",
        "own_unembedding=false",
        "--verify",
    )
    config = MultiTokenLM.from_pretrained(tmp_path / "b").mtp_config
    assert (config.heads, config.blocks_per_head, config.own_unembedding) == ("medusa", 2, False)
    assert document["num_future_tokens"] == 3
    assert "heads added: offsets 2 to 3, as they start from the base" in shown
    for options, words in (
        (("--head-option", "blocks_per_head"), "NAME=VALUE"),
        (("--head-option", "block_per_head=2"), "did you mean 'blocks_per_head'"),
        (("--head-option", "blocks_per_head=two"), "--head-option blocks_per_head"),
        (("--heads", "hydra", "--head-option", "wiring=causal"), "wiring='causal' means nothing"),
    ):
        assert words in refused(capsys, source, str(tmp_path / "c"), *to_headway, *options)


def test_heads_alone_are_read_with_their_base(tmp_path: Path, capsys):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    headed = ("--from", "hf", "--to", "medusa-engine", "-n", "3", "--heads", "medusa", "--verify")
    _, shown = convert(capsys, str(tmp_path / "a"), str(tmp_path / "m"), *headed)
    assert "the base is not in this layout" in shown
    back = ("--from", "medusa-engine", "--to", "headway", "--verify")
    document, _ = convert(capsys, str(tmp_path / "m"), str(tmp_path / "b"), *back, "--base", str(tmp_path / "a"))
    assert document["num_future_tokens"] == 3
    assert "--base" in refused(capsys, str(tmp_path / "m"), str(tmp_path / "c"), *back)
    wrong = ("--from", "hf", "--to", "headway", "-n", "2")
    assert "--from medusa-engine" in refused(capsys, str(tmp_path / "m"), str(tmp_path / "c"), *wrong)
