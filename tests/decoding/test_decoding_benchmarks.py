"""The benchmarks of decoding go through to their one document on tiny models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from headway.data.tokenizers import byte_tokenizer
from headway.decoding.calibration import run as calibration_run
from headway.decoding.calibration.cost import StepSeconds
from headway.decoding.lean.few_rows import kernel_for
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import tiny_base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return importlib.import_module


@pytest.fixture
def byte_folder(tmp_path):
    """A byte model with n = 4 that writes few different bytes, so that drafts of any rank are right at times."""
    tokenizer = byte_tokenizer()
    folder = tmp_path / "model"
    base = tiny_base("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        base.lm_head.weight.zero_()
        base.lm_head.weight[ord("a") : ord("g")].normal_(generator=torch.Generator().manual_seed(0))
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=4, heads="linear", head_init="fresh"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """Some prose."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of a text that is cut into prompts\n" for number in range(40)))
    return path


def test_every_way_to_serve_gives_the_same_tokens(benchmark, byte_folder, text, tmp_path, capsys):
    output = tmp_path / "scheduler.json"
    sizes = ["--requests", "4", "--rows", "2", "--prompt-tokens", "4", "9", "--new-tokens", "3", "8", "--loads", "0.9"]
    benchmark("scheduler").main([str(byte_folder), str(text), *sizes, "--executor", "eager", "--output", str(output)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text(encoding="utf-8")) == document
    arms = [(arm["drafts"], arm["arm"]) for arm in document["arms"]]
    assert arms == [(drafts, arm) for drafts in ("plain", "auto") for arm in ("generate", "gangs", "scheduler")]
    for arm in document["arms"]:
        assert arm["texts_that_differ"] == 0
        assert arm["tokens"] == document["setting"]["tokens"] > 4 * 3
        learnt = arm["drafts"] == "auto" and arm["arm"] != "generate"
        assert bool(arm["control"]) == learnt
        assert all(own["forwards"] and 0 <= own["mean_length"] <= 3 for own in arm["control"])
        assert arm["latency_seconds"]["p50"] >= arm["first_token_seconds"]["p50"] > 0


def test_every_draft_gives_the_same_text_and_loops_are_left_out(
    benchmark, byte_folder, text, tmp_path, capsys, monkeypatch
):
    def steps(model, prompts_BT, drafts, **options):
        return {draft: StepSeconds(*[1.0 + 0.1 * len(draft)] * 3, 1) for draft in drafts}

    monkeypatch.setattr(calibration_run, "measure_steps", steps)
    module = benchmark("calibrated_tree")
    output = tmp_path / "tree.json"
    sizes = ["--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "9", "--repeats", "2", "--windows", "2"]
    options = [*sizes, "--temperature", "1", "--executor", "eager", "--output", str(output)]
    texts = []
    monkeypatch.setattr(module, "loops", lambda tokens: texts.append(tokens) or tokens == texts[0])
    module.main([str(byte_folder), str(text), *options])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text(encoding="utf-8")) == document
    assert (document["rounds"], document["looping"]) == (2, 1)
    assert tuple(row["arm"] for row in document["rows"]) == module.ARMS
    assert document["left_out"] == {}
    for row in document["rows"]:
        assert row["prompts_that_differ_from_plain"] == 0
        assert 1 <= row["tokens_per_forward"] <= 1 + 8 + 3
        assert len(row["over_plain"]["rounds"]) == 2
        assert row["expected"] is None or row["expected"]["tokens_per_forward"] >= 1
    monkeypatch.setattr(module, "loops", lambda tokens: True)
    with pytest.raises(SystemExit, match="2"):
        module.main([str(byte_folder), str(text), *options])
    assert "all 2 texts loop" in capsys.readouterr().err


@pytest.mark.skipif(kernel_for(torch.zeros(1, 1)) is None, reason="no C++ compiler for the kernel")
def test_steps_on_rounded_weights_stand_beside_those_on_the_models_own(benchmark, monkeypatch, capsys):
    module = benchmark("decoding_steps")
    heads = {"heads": "linear", "markov_rank": 8}
    monkeypatch.setitem(module.SHAPES, "9M", module.Shape(64, 1, 128, 2, 3, heads))
    monkeypatch.setattr(module, "GENERATED", 4)
    module.main(["--sizes", "9M", "--repeats", "2", "--int8"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row, size in zip(rows, (4, 2), strict=True):
        rounded = row["int8"]
        assert "another model" in rounded["another_model"]
        assert rounded["plain_step_ms"] > 0 < rounded["drafted_step_over_own_weights"]
        # Four maps of attention, gate and up, the way back from 192, 128 tokens: a byte per weight, scale and sum per output.
        maps = 4 * 64 * (64 + 8) + 2 * 192 * (64 + 8) + 64 * (192 + 8) + 128 * (64 + 8)
        cached = 2 * module.CONTEXT * 64 * size
        assert rounded["bytes_plain_step"] == maps + 3 * 64 * size + cached
        assert rounded["bytes_plain_step"] < row["bytes_plain_step"]
        assert rounded["bytes_drafted_step"] < row["bytes_drafted_step"]


def test_without_a_file_the_text_is_that_of_held_out_packages(benchmark, tmp_path):
    (tmp_path / "reference.json").write_text(json.dumps({"data": {"held_out_packages": ["this.py", "this"]}}))
    text = benchmark("calibrated_tree").held_out_packages(tmp_path)
    assert b"The Zen of Python" not in text
    assert b"Gur Mra bs Clguba" in text
