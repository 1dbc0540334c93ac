"""16,384 new tokens of one text: whether memory per token stays flat, and how its time grows.

A tiny random model decodes plainly and with drafts on both executors. After every 1,024 tokens: resident memory, bytes of keys
and values that are allocated, what was foreseen for them at the limit (`headway.model.memory.cache_footprint`), and the median
CPU time of a forward. Beside them how much longer torch's attention alone takes at the last length than at the first, in as many
layers and positions: a forward has nothing else that grows.

    python benchmarks/long_generation.py --output benchmarks/results/long_generation.json     # 5 minutes

Resident memory is read after the C allocator has given back what it holds without need (`malloc_trim`). Without that, caches that
were freed when they grew, and temporaries, look like 2 to 3 KB per token in a text of 3,072, although they belong to no token.
They are reported on their own, as `kept_by_allocator_bytes`.

Each arm runs in a process of its own, so that its memory is its own. The document is written after every arm, with
`complete` true after the last; one JSON document last; exit status 1 where memory grew by more than the limit beyond the cache,
or the cache became another than foreseen. `--busy` marks a run beside other work, whose times are hints (memory is memory).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import headway
from headway.decoding.cache import RaggedCache
from headway.decoding.engine import ENGINE, decoding_context
from headway.model.config import MultiTokenConfig
from headway.model.memory import cache_footprint
from headway.provenance import provenance

WIDTH, LAYERS, HEADS, VOCABULARY, FUTURE = 64, 2, 2, 64, 3
PROMPT, WINDOW = 16, 1024
ARMS = {
    "eager, plain": ("eager", 0),
    "eager, drafts of 2": ("eager", FUTURE - 1),
    "lean, plain": ("lean", 0),
    "lean, drafts of 2": ("lean", FUTURE - 1),
}
MOST_BEYOND_CACHE = 512
"""Bytes per new token, beside keys and values, that a generation may hold on to: its tokens and statistics."""
BUSY = "taken beside other work: hints, not figures"


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
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def trim() -> None:
    """Let the C allocator give back what it keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)


def attention_seconds(length: int, *, positions: int, layers: int) -> float:
    """Median CPU time of the attention of a block of `positions` over so many slots in all layers."""
    query = torch.randn(1, HEADS, positions, WIDTH // HEADS)
    # Every layer reads keys and values of its own, which therefore do not stay in a near cache.
    caches = [[torch.randn(1, HEADS, length, WIDTH // HEADS) for _ in range(2)] for _ in range(layers)]
    mask = torch.zeros(1, 1, positions, length) if positions > 1 else None
    seconds = []
    for _ in range(100):
        start = time.process_time()
        for keys, values in caches:
            F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        seconds.append(time.process_time() - start)
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
    trim()
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
                untrimmed = resident()
                trim()
                windows.append(
                    {
                        "tokens": made,
                        "resident_bytes": resident() - start_bytes,
                        "kept_by_allocator_bytes": untrimmed - resident(),
                        "cache_bytes": cache_bytes(loop.executor.cache),
                        "milliseconds_per_forward": round(1000 * statistics.median(seconds), 4),
                    }
                )
                seconds.clear()
    cache = loop.executor.cache
    layers = len(cache.layers)
    footprint = cache_footprint(model.config, 1, dtype=torch.float32, num_head_layers=layers - LAYERS)
    beyond = [window["resident_bytes"] - window["cache_bytes"] for window in windows]
    # From the second window on: the first has what any generation takes, however long.
    slope = (beyond[-1] - beyond[1]) / (windows[-1]["tokens"] - windows[1]["tokens"]) if len(windows) > 2 else 0.0
    # The median forward of a window stands in its middle.
    lengths = (PROMPT + WINDOW // 2, PROMPT + tokens - WINDOW // 2)
    short, long = (attention_seconds(length, positions=1 + drafts, layers=layers) for length in lengths)
    result = loop.result()
    return {
        "arm": arm,
        "new_tokens": int(result.num_new_tokens[0]),
        "tokens_per_forward": round(result.acceptance.mean_acceptance_length, 4),
        "cache_bytes_foreseen": footprint.total_bytes(context_length=cache.capacity, batch_size=1),
        "cache_bytes_at_the_end": windows[-1]["cache_bytes"],
        "bytes_per_token_of_cache": footprint.bytes_per_token,
        "bytes_per_token_beyond_the_cache": round(slope, 1),
        "most_kept_by_allocator_bytes": max(window["kept_by_allocator_bytes"] for window in windows),
        "milliseconds_that_a_forward_grew": round(
            windows[-1]["milliseconds_per_forward"] - windows[0]["milliseconds_per_forward"], 4
        ),
        "milliseconds_that_attention_alone_grows": round(1000 * (long - short), 4),
        "windows": windows,
    }


def cache_bytes(cache: RaggedCache) -> int:
    """Keys and values that are allocated; zeroed when they are, so all of them are in memory."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def holds(row: dict[str, Any]) -> bool:
    """Whether an arm's memory did what was promised."""
    grown = row["bytes_per_token_beyond_the_cache"] <= MOST_BEYOND_CACHE
    return bool(grown and row["cache_bytes_at_the_end"] == row["cache_bytes_foreseen"])


def main() -> None:
    """Run the arms one after the other and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--tokens", type=int, default=16_384, help="new tokens")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="which")
    parser.add_argument("--busy", action="store_true", help="the machine does other work: mark the times as hints")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "benchmark": "long_generation",
        "complete": False,
        "setting": {
            "model": f"llama, width {WIDTH}, {LAYERS} layers and {FUTURE - 1} heads, float32, random weights",
            "prompt_tokens": PROMPT,
            "new_tokens": arguments.tokens,
            "threads": arguments.threads,
            "most_bytes_per_token_beyond_the_cache": MOST_BEYOND_CACHE,
            "times": BUSY if arguments.busy else "CPU time of a quiet machine, median of a window's forwards",
        },
        "arms": rows,
        "provenance": provenance(),
    }
    for arm in arguments.arms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (arm, arguments.tokens, arguments.threads)))
        document["complete"] = len(rows) == len(arguments.arms)
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        shown = {name: value for name, value in rows[-1].items() if name != "windows"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
    print(json.dumps(document))
    sys.exit(0 if all(map(holds, rows)) else 1)


if __name__ == "__main__":
    main()
