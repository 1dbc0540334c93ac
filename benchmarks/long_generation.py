"""16,384 new tokens of one text: whether memory per token stays flat, and how its time grows.

A tiny random model decodes plainly and with drafts on both executors. After every 1,024 tokens: resident memory, bytes of keys
and values that are allocated, what was foreseen for them at the limit (`headway.model.memory.cache_footprint`), and the median
CPU time of a forward. Beside them the time of attention alone at the same lengths, which is all that a forward may grow by.

    python benchmarks/long_generation.py [--output benchmarks/results/long_generation.json]

Each arm runs in a process of its own, so that its memory is its own. One JSON document last; exit status 1 where memory grew by
more than the limit beyond the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import headway
from headway.decoding.engine import ENGINE, decoding_context
from headway.model.config import MultiTokenConfig
from headway.model.memory import cache_footprint
from headway.provenance import provenance

WIDTH, LAYERS, HEADS, VOCABULARY, FUTURE = 128, 2, 4, 64, 3
PROMPT, WINDOW = 16, 1024
ARMS = {
    "eager, plain": ("eager", 0),
    "eager, drafts of 2": ("eager", FUTURE - 1),
    "lean, plain": ("lean", 0),
    "lean, drafts of 2": ("lean", FUTURE - 1),
}
MOST_BEYOND_CACHE = 1024
"""Bytes per new token, beside keys and values, that a generation may hold on to: its tokens and statistics."""


def build(tokens: int) -> Any:
    """The model, with positions for the whole text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS + FUTURE - 1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=PROMPT + tokens,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return headway.MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=FUTURE)).eval()


def resident() -> int:
    """Bytes of this process that are in memory, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def attention_seconds(length: int) -> float:
    """Median CPU time of one layer's attention of one position over so many."""
    query = torch.randn(1, HEADS, 1, WIDTH // HEADS)
    keys = torch.randn(1, HEADS, length, WIDTH // HEADS)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        for _ in range(10):
            F.scaled_dot_product_attention(query, keys, keys)
        seconds.append((time.process_time() - start) / 10)
    return statistics.median(seconds)


def run(arm: str, tokens: int, threads: int) -> dict[str, Any]:
    """One arm, in a process of its own."""
    torch.set_num_threads(threads)
    executor, drafts = ARMS[arm]
    model = build(tokens)
    options: dict[str, Any] = {"do_sample": True, "seed": 0, "top_k": 0, "executor": executor}
    prompt = torch.arange(PROMPT)[None] % VOCABULARY
    model.generate(prompt, max_new_tokens=64, num_draft_tokens=drafts, **options)  # what a first call costs
    loop = ENGINE.start(model, prompt, max_new_tokens=tokens, num_draft_tokens=drafts, **options)
    start_bytes = resident()
    windows: list[dict[str, Any]] = []
    seconds: list[float] = []
    made = 0
    with decoding_context(model):
        while not loop.finished:
            start = time.process_time()
            made += len(loop.step()[0])
            seconds.append(time.process_time() - start)
            if made >= WINDOW * (len(windows) + 1) or loop.finished:
                held = sum(
                    tensor.numel() * tensor.element_size()
                    for layer in loop.executor.cache.layers
                    for tensor in (layer.keys, layer.values)
                )
                windows.append(
                    {
                        "tokens": made,
                        "resident_bytes": resident() - start_bytes,
                        "cache_bytes": held,
                        "milliseconds_per_forward": round(1000 * statistics.median(seconds), 4),
                    }
                )
                seconds.clear()
    cache = loop.executor.cache
    footprint = cache_footprint(model.config, 1, dtype=torch.float32, num_head_layers=len(cache.layers) - LAYERS)
    beyond = [window["resident_bytes"] - window["cache_bytes"] for window in windows]
    # From the second window on: the first has what any generation takes, however long.
    slope = (beyond[-1] - beyond[1]) / (windows[-1]["tokens"] - windows[1]["tokens"]) if len(windows) > 2 else 0.0
    growth = attention_seconds(PROMPT + tokens) - attention_seconds(WINDOW)
    result = loop.result()
    return {
        "arm": arm,
        "new_tokens": int(result.num_new_tokens[0]),
        "tokens_per_forward": round(result.acceptance.mean_acceptance_length, 4),
        "cache_bytes_foreseen": footprint.total_bytes(context_length=cache.capacity, batch_size=1),
        "cache_bytes_at_the_end": windows[-1]["cache_bytes"],
        "bytes_per_token_of_cache": footprint.bytes_per_token,
        "bytes_per_token_beyond_the_cache": round(slope, 1),
        "milliseconds_that_a_forward_grew": round(
            windows[-1]["milliseconds_per_forward"] - windows[0]["milliseconds_per_forward"], 4
        ),
        "milliseconds_that_attention_alone_grows": round(1000 * LAYERS * growth, 4),
        "windows": windows,
    }


def main() -> None:
    """Run the arms one after the other and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--tokens", type=int, default=16_384, help="new tokens")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="which")
    arguments = parser.parse_args()
    rows = []
    for arm in arguments.arms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (arm, arguments.tokens, arguments.threads)))
        shown = {name: value for name, value in rows[-1].items() if name != "windows"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
    document = {
        "benchmark": "long_generation",
        "setting": {
            "model": f"llama, width {WIDTH}, {LAYERS} layers and {FUTURE - 1} heads, float32, random weights",
            "prompt_tokens": PROMPT,
            "new_tokens": arguments.tokens,
            "threads": arguments.threads,
        },
        "arms": rows,
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    sys.exit(1 if any(row["bytes_per_token_beyond_the_cache"] > MOST_BEYOND_CACHE for row in rows) else 0)


if __name__ == "__main__":
    main()
