"""Cost of one 4-position step with heads over one plain step, and how near the plain step is to the memory's limit.

Random weights, batch 1, context 128, float32 and bfloat16, at about 10M to 350M parameters (llama shapes), on the eager
and on the lean executor. Everything of a row of the table is interleaved in one process: the plain step, the 4-position
step (base and heads on 4 positions, then the next draft), reading the touched weights once (the limit), and `generate` of
Hugging Face and of this engine with plain decoding, per token. Acceptance plays no part here. One JSON document last.

    python benchmarks/decoding_steps.py [--output benchmarks/results/decoding_steps.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import headway
from headway.decoding.engine import decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import align_prompts
from headway.model.config import MultiTokenConfig
from headway.provenance import provenance

# name -> width, layers of the base, vocabulary, heads
SHAPES = {
    "10M": (256, 8, 8192, 4),
    "30M": (512, 8, 8192, 8),
    "110M": (768, 12, 32000, 12),
    "350M": (1024, 24, 32000, 16),
}
CONTEXT, DRAFTS, GENERATED = 128, 3, 32


def build(name: str, dtype: torch.dtype) -> Any:
    """A random model of the shape with three heads."""
    width, layers, vocabulary, heads = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers + DRAFTS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = headway.MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=DRAFTS + 1))
    return model.to(dtype).eval()


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def measure(name: str, *, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    model = build(name, dtype)
    ids = torch.randint(0, SHAPES[name][2], (1, CONTEXT))
    prompts = align_prompts(ids, None, vocabulary=SHAPES[name][2])
    touched = [p for n, p in model.base.named_parameters() if "embed_tokens" not in n]
    flat = torch.cat([p.detach().reshape(-1) for p in touched])
    with_heads = flat.numel() + sum(p.numel() for p in model.heads.parameters())
    # Reading weights as integers costs no conversion: only the memory is measured.
    words = flat.view(torch.int64) if flat.numel() * flat.element_size() % 8 == 0 else flat.view(torch.int32)
    lean = LeanModel(model)
    executors: dict[str, list[EagerExecutor]] = {
        label: [kind(run, prompts, max_new_tokens=GENERATED, num_draft_tokens=drafts) for drafts in (0, DRAFTS)]
        for label, kind, run in (("eager", EagerExecutor, model), ("lean", LeanExecutor, lean))
    }
    one, four = torch.randint(0, 100, (1, 1)), torch.randint(0, 100, (1, DRAFTS + 1))

    def plain_step(executor: EagerExecutor) -> None:
        states = executor.block(one, [CONTEXT], num_offsets=1)
        executor.logits(states.last_hidden_BTD).argmax(-1).tolist()

    def drafted_step(executor: EagerExecutor) -> None:
        states = executor.block(four, [CONTEXT], num_offsets=DRAFTS + 1)
        executor.logits(states.last_hidden_BTD).argmax(-1).tolist()
        executor.draft(states, [1], count=DRAFTS)

    common = {"max_new_tokens": GENERATED, "do_sample": False, "use_cache": True}
    calls: dict[str, Callable[[], Any]] = {
        "limit": lambda: words.sum(),
        "plain_step": lambda: plain_step(executors["eager"][0]),
        "drafted_step": lambda: drafted_step(executors["eager"][1]),
        "lean_plain_step": lambda: plain_step(executors["lean"][0]),
        "lean_drafted_step": lambda: drafted_step(executors["lean"][1]),
        "engine_plain_generate": lambda: model.generate(ids, num_draft_tokens=0, **common),
        "lean_plain_generate": lambda: model.generate(ids, num_draft_tokens=0, executor="lean", **common),
        "huggingface_generate": lambda: model.base.generate(ids, **common),
    }
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    with torch.inference_mode(), decoding_context(model):
        for plain, drafted in executors.values():
            plain.prefill(num_offsets=1)
            drafted.prefill(num_offsets=DRAFTS + 1)
        for repeat in range(repeats + 2):
            for label, call in calls.items():
                took = timed(call)
                if repeat >= 2:
                    seconds[label].append(took)
    median = {label: statistics.median(times) * 1000 for label, times in seconds.items()}
    own_limit = median["limit"] * with_heads / flat.numel()
    ratios = _ratios(seconds["drafted_step"], seconds["plain_step"])
    lean_ratios = _ratios(seconds["lean_drafted_step"], seconds["lean_plain_step"])
    row = {
        "size": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "bytes_plain_step": flat.numel() * flat.element_size(),
        "bytes_drafted_step": with_heads * flat.element_size(),
        "limit_ms": round(median["limit"], 3),
        "plain_step_ms": round(median["plain_step"], 3),
        "drafted_step_ms": round(median["drafted_step"], 3),
        "drafted_over_plain": round(statistics.median(ratios), 3),
        "drafted_over_plain_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "plain_step_share_of_limit": round(median["limit"] / median["plain_step"], 3),
        "drafted_step_share_of_own_limit": round(own_limit / median["drafted_step"], 3),
        "lean": {
            "way": lean.way,
            "copied_bytes": lean.num_bytes,
            "plain_step_ms": round(median["lean_plain_step"], 3),
            "drafted_step_ms": round(median["lean_drafted_step"], 3),
            "drafted_over_plain": round(statistics.median(lean_ratios), 3),
            "drafted_over_plain_quartiles": [round(q, 3) for q in statistics.quantiles(lean_ratios, n=4)],
            "plain_step_share_of_limit": round(median["limit"] / median["lean_plain_step"], 3),
            "drafted_step_share_of_own_limit": round(own_limit / median["lean_drafted_step"], 3),
            "plain_ms_per_token": round(median["lean_plain_generate"] / GENERATED, 3),
        },
        "engine_plain_ms_per_token": round(median["engine_plain_generate"] / GENERATED, 3),
        "huggingface_generate_ms_per_token": round(median["huggingface_generate"] / GENERATED, 3),
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved measurements per figure")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="shapes to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(name, dtype=dtype, repeats=arguments.repeats)
        for name in arguments.sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    document = {
        "benchmark": "decoding_steps",
        "setting": {
            "context": CONTEXT,
            "drafted_tokens": DRAFTS,
            "batch": 1,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "weights": "random",
            "limit": "summing the weights that a plain step touches (the embedding table left out) as integers",
        },
        "rows": rows,
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
