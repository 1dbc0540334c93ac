"""`benchmarks/gpu_decoding.py` runs whole without a GPU when it is rehearsed, and says so when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_decoding

    return gpu_decoding


def test_a_rehearsal_runs_every_part(benchmark, tmp_path, capsys, monkeypatch):
    model = benchmark.headway.MultiTokenLM.from_config(
        benchmark.LlamaConfig(**benchmark.TINY, eos_token_id=None, bos_token_id=None, pad_token_id=None),
        benchmark.MultiTokenConfig(num_future_tokens=3),
        shorten_trunk=False,
    )
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        benchmark, "prompts_from", lambda *_, **__: [torch.arange(12)[None], torch.arange(20, 32)[None]]
    )
    output = tmp_path / "gpu.json"
    options = ["--model", str(tmp_path / "model"), "--text", "text.txt", "--output", str(output)]
    assert benchmark.main(["--rehearse", *options]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text(encoding="utf-8")) == document
    assert (document["device"], document["rehearsal"]) == ("CPU, a rehearsal", True)
    assert document["bandwidth"]["bytes_per_second"] > 0
    assert [(row["batch"], row["drafted_tokens"]) for row in document["steps"]] == [(1, 0), (1, 3), (3, 0), (3, 3)]
    for row in document["steps"]:
        assert set(row["share_of_bandwidth"]) == {"eager", "lean", "static", "graph"}
    simulated = document["speed_simulated"][0]
    assert simulated["tokens_per_forward"]["1.5 (simulated)"] == pytest.approx(1.5, abs=0.3)
    assert "drafts, graph, 1.5 tokens per forward (simulated)" in simulated["over_plain_graph"]
    assert document["speed_measured"]["prompts"] == document["speed_measured"]["identical_texts"] == 2
    assert document["lossless"]["low_precision"]["replayed_equals_called"]
    assert document["lossless"]["float32"]["lossless"]
    assert document["lossless"]["float32"]["tokens_per_forward"] > 1.5


def test_without_a_device_it_says_so_in_one_line(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "no CUDA device here: run this on a machine with one, or pass --rehearse\n"


def test_prompts_are_spread_over_the_text(benchmark, tmp_path, monkeypatch):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return type("Encoded", (), {"input_ids": torch.arange(len(text))[None]})

    monkeypatch.setattr(benchmark.AutoTokenizer, "from_pretrained", lambda folder: Tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("x" * 50, encoding="utf-8")
    setting = benchmark.setting_for(type("Arguments", (), {"rehearse": True}))
    assert [row[0, 0].item() for row in benchmark.prompts_from(tmp_path, text, setting, count=3)] == [0, 16, 32]
    with pytest.raises(SystemExit, match="need more text"):
        benchmark.prompts_from(tmp_path, text, setting, count=5)
