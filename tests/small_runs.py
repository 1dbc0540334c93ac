"""What the tests of training share: a tiny model, a tiny corpus, a run of seconds, and how two runs are compared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM

WORDS = ["trunk", "head", "token", "offset", "draft", "block", "accept", "cache", "row", "step", "loss", "mean"]
TIMES = ("tokens_per_second", "elapsed_seconds", "seconds", "mfu", "resident_bytes", "gpu_peak_bytes")


def tiny_model(*, tied: bool = False, gpt2: bool = False) -> MultiTokenLM:
    """Two offsets, three layers in all, vocabulary 40, the same weights at every call."""
    torch.manual_seed(0)
    shape: Any
    if gpt2:
        shape = GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    else:
        shape = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    return MultiTokenLM.from_config(shape, MultiTokenConfig(num_future_tokens=2))


def write_corpus(folder: Path) -> Path:
    """Six groups of four small texts, short enough that packed rows hold several documents."""
    draw = random.Random(7)
    for group in range(6):
        (folder / f"package{group}").mkdir(parents=True)
        for number in range(4):
            text = " ".join(draw.choice(WORDS) for _ in range(30 + 10 * number))
            (folder / f"package{group}" / f"text{number}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def run_fields(corpus: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Fields of a `TrainConfig` for six steps of a model of 60,000 weights."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 2,
        "num_future_tokens": 3,
        "data": [str(corpus)],
        "held_out_fraction": 0.2,
        "sequence_length": 48,
        "batch_size": 2,
        "steps": 6,
        "learning_rate": 3e-3,
        "threads": 1,
        "eval_every_steps": None,
        "checkpoint_every_steps": 2,
        "log_every_steps": 1,
        "tensorboard": False,
        "output": str(output),
    }
    return fields | overrides


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file without the fields that tell the time."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a headway model folder, base and heads."""
    heads = load_file(folder / "mtp" / "heads.safetensors")
    return load_file(folder / "model.safetensors") | {f"heads.{name}": tensor for name, tensor in heads.items()}


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_same_run(left: Path, right: Path, *, step: int) -> None:
    """Two output folders hold the same finished run: model, last checkpoint, metrics, bit for bit."""
    assert_same_tensors(weights(left / "model"), weights(right / "model"))
    ours, theirs = (folder / "checkpoints" / f"step-{step:08d}" for folder in (left, right))
    assert_same_tensors(load_file(ours / "optimizer.safetensors"), load_file(theirs / "optimizer.safetensors"))
    states = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (ours, theirs)]
    for state in states:
        del state["state"]["elapsed_seconds"], state["config"]
    assert states[0] == states[1]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(left / name) == lines(right / name), name
