"""Cost of one step with drafts over one plain step, and how near both are to their byte floors.

Random weights, batch 1, context 128, float32 and bfloat16, at about 9M to 350M parameters (llama shapes), on the eager
executor, the lean one, and the lean one on oneDNN's packed products instead of our kernel. Everything of a row of the table is
interleaved in one process: the plain step, the drafted step (base and all heads on a block of n positions, then the next
draft), reading the touched weights once (the limit), and `generate` of Hugging Face and of this engine with plain decoding,
per token. Steps and readings are made some at a time, as in decoding: a step that follows another one finds awake threads and
what fits into the caches. "9M" has the shape of the reference model (bytes, 8 future tokens, linear heads with a Markov bias);
the others have three transformer heads. Acceptance plays no part here.

A step's byte floor is the time of reading what it cannot do without, each byte once: weights of the layers that run, the
unembedding, and keys and values of the context; at the rate at which the same weights are read without computing anything.
With --int8 the lean executor also runs weights rounded to int8 (another model, docs/decisions/0020-int8-weights.md) in the same
rounds, beside the floor of its own bytes. Lines of text on stderr, one JSON document last on stdout.

    python benchmarks/decoding_steps.py [--output benchmarks/results/decoding_steps.json]
    python benchmarks/decoding_steps.py --sizes 110M
    python benchmarks/decoding_steps.py --sizes 350M
    python benchmarks/decoding_steps.py --sizes 9M 110M --int8 --output benchmarks/results/decoding_steps_int8.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

import headway
from headway.decoding.engine import decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.few_rows import read_once
from headway.decoding.lean.model import INT8_NOTE, LeanModel
from headway.decoding.lean.native import instructions
from headway.decoding.lean.pages import huge_pages
from headway.decoding.prompts import align_prompts
from headway.model.config import MultiTokenConfig
from headway.provenance import provenance


@dataclass(frozen=True)
class Shape:
    """A llama and its heads."""

    width: int
    layers: int
    vocabulary: int
    heads: int
    future_tokens: int = 4
    options: dict[str, Any] = field(default_factory=dict)


BURST = 4
SHAPES = {
    "9M": Shape(256, 10, 256, 4, 8, {"heads": "linear", "markov_rank": 128}),
    "10M": Shape(256, 8, 8192, 4),
    "30M": Shape(512, 8, 8192, 8),
    "110M": Shape(768, 12, 32000, 12),
    "350M": Shape(1024, 24, 32000, 16),
}
CONTEXT, GENERATED = 128, 32


def build(shape: Shape, dtype: torch.dtype) -> Any:
    """A random model of the shape."""
    torch.manual_seed(0)
    own_layers = shape.future_tokens - 1 if not shape.options else 0
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=-(-8 * shape.width // 3 // 32) * 32,
        num_hidden_layers=shape.layers + own_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    mtp_config = MultiTokenConfig(num_future_tokens=shape.future_tokens, **shape.options)
    return headway.MultiTokenLM.from_config(config, mtp_config).to(dtype).eval()


def int8_bytes(part: nn.Module) -> int:
    """What is read of a part whose maps are rounded: their values, scales and sums; the rest in its own precision.

    Rows are padded to 64 inputs. Of the Markov bias, which keeps its precision, W2 counts; tables of which rows are looked up
    do not.
    """
    count = 0
    for name, module in part.named_modules():
        rounded = isinstance(module, nn.Linear) and "markov" not in name
        if rounded:
            count += module.out_features * (-(-module.in_features // 64) * 64 + 8)
        for own, parameter in module.named_parameters(recurse=False):
            looked_up = "embed_tokens" in name or f"{name}.{own}".endswith("markov.previous.weight")
            if not looked_up and not (rounded and own == "weight"):
                count += parameter.numel() * parameter.element_size()
    return count


def timed(function: Callable[[], Any], *, calls: int = 1) -> float:
    """Seconds of one call, of several in a row that follow an untimed one where `calls` is more than 1."""
    if calls > 1:
        function()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def measure(name: str, *, dtype: torch.dtype, repeats: int, int8: bool = False) -> dict[str, Any]:
    """One row of the table.

    Raises:
        SystemExit: int8 weights without the kernel that multiplies by them.
    """
    shape = SHAPES[name]
    drafts = shape.future_tokens - 1
    model = build(shape, dtype)
    ids = torch.randint(0, shape.vocabulary, (1, CONTEXT))
    prompts = align_prompts(ids, None, vocabulary=shape.vocabulary)
    base = sum(p.numel() for n, p in model.base.named_parameters() if "embed_tokens" not in n)
    # Of W1 of the Markov bias single rows are read, as of the embedding table.
    of_heads = sum(p.numel() for n, p in model.heads.named_parameters() if "markov.previous" not in n)
    size = next(model.parameters()).element_size()
    cached = 2 * CONTEXT * shape.width * size
    layers = shape.layers
    # Heads with layers of their own look back at keys and values too.
    head_layers = len(model.heads.decoder_layers)
    bytes_plain = base * size + layers * cached
    bytes_drafted = (base + of_heads) * size + (layers + head_layers) * cached
    weights = huge_pages(base * size // 4 * 4)
    weights.view(torch.int32).copy_(torch.arange(len(weights) // 4) % 1000)
    numbers, words = weights.view(torch.float32), weights[: len(weights) // 8 * 8].view(torch.int64)
    # The packed copies are made first: the kernel's way moves the weights.
    packed = LeanModel(model, way="packed")
    lean = LeanModel(model)
    kinds: list[tuple[str, type[EagerExecutor], Any]] = [
        ("eager", EagerExecutor, model),
        ("packed", LeanExecutor, packed),
        ("lean", LeanExecutor, lean),
    ]
    rounded: LeanModel | None = None
    if int8:
        made = lean_model(model, weights="int8")
        if isinstance(made, str):
            raise SystemExit(f"--int8: {made}")
        rounded = made
        kinds.append(("int8", LeanExecutor, rounded))
    executors: dict[str, list[EagerExecutor]] = {
        label: [kind(run, prompts, max_new_tokens=GENERATED, num_draft_tokens=count) for count in (0, drafts)]
        for label, kind, run in kinds
    }
    one, block, last_B = torch.randint(0, 100, (1, 1)), torch.randint(0, 100, (1, drafts + 1)), torch.tensor([7])

    def plain_step(executor: EagerExecutor) -> None:
        states = executor.block(one, [CONTEXT], num_offsets=1)
        executor.logits(states.last_hidden_BTD).argmax(-1).tolist()

    def drafted_step(executor: EagerExecutor) -> None:
        states = executor.block(block, [CONTEXT], num_offsets=drafts + 1)
        executor.logits(states.last_hidden_BTD).argmax(-1).tolist()
        executor.draft(states, [1], last_B=last_B, count=drafts)

    common = {"max_new_tokens": GENERATED, "do_sample": False, "use_cache": True}
    threads = torch.get_num_threads()
    calls: dict[str, Callable[[], Any]] = {
        "read_by_torch": lambda: words.sum(),
        "read_by_kernel": lambda: read_once(numbers, threads=threads),
        **{f"{label}_plain_step": partial(plain_step, pair[0]) for label, pair in executors.items()},
        **{f"{label}_drafted_step": partial(drafted_step, pair[1]) for label, pair in executors.items()},
        "engine_plain_generate": lambda: model.generate(ids, num_draft_tokens=0, **common),
        "lean_plain_generate": lambda: model.generate(ids, num_draft_tokens=0, executor="lean", **common),
        "huggingface_generate": lambda: model.base.generate(ids, **common),
    }
    if not read_once(numbers, threads=threads):
        del calls["read_by_kernel"]
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    with torch.inference_mode(), decoding_context(model):
        for plain, drafted in executors.values():
            plain.prefill(num_offsets=1)
            drafted.prefill(num_offsets=drafts + 1)
        for repeat in range(repeats + 2):
            for label, call in calls.items():
                # Generations are long and steps are short: half as many of them tell as much.
                if label.endswith("generate") and repeat % 2:
                    continue
                took = timed(call, calls=1 if label.endswith("generate") else BURST)
                if repeat >= 2:
                    seconds[label].append(took)
    median = {label: statistics.median(times) * 1000 for label, times in seconds.items()}
    readings = {label: ms for label, ms in median.items() if label.startswith("read_by")}
    limit = min(readings.values())
    rate = len(weights) / limit / 1e6
    floors = {"plain": bytes_plain / rate / 1e6, "drafted": bytes_drafted / rate / 1e6}

    def steps(label: str, floors: dict[str, float] = floors) -> dict[str, Any]:
        """Both steps of an executor beside their floors."""
        ratios = _ratios(seconds[f"{label}_drafted_step"], seconds[f"{label}_plain_step"])
        plain, drafted = median[f"{label}_plain_step"], median[f"{label}_drafted_step"]
        return {
            "plain_step_ms": round(plain, 3),
            "drafted_step_ms": round(drafted, 3),
            "drafted_over_plain": round(statistics.median(ratios), 3),
            "drafted_over_plain_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
            "plain_step_share_of_limit": round(limit / plain, 3),
            "plain_step_share_of_floor": round(floors["plain"] / plain, 3),
            "drafted_step_share_of_floor": round(floors["drafted"] / drafted, 3),
        }

    row: dict[str, Any] = {
        "size": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "positions": drafts + 1,
        "bytes_weights": base * size,
        "bytes_plain_step": bytes_plain,
        "bytes_drafted_step": bytes_drafted,
        "limit_ms": round(limit, 3),
        "limit_by": min(readings, key=lambda label: readings[label]),
        "gigabytes_per_second": round(rate, 1),
        "floor_plain_step_ms": round(floors["plain"], 3),
        "floor_drafted_step_ms": round(floors["drafted"], 3),
        "floor_drafted_over_plain": round(bytes_drafted / bytes_plain, 3),
        "eager": steps("eager"),
        "packed": {"copied_bytes": packed.num_bytes} | steps("packed"),
        "lean": {
            "how": lean.description,
            "copied_bytes": lean.num_bytes,
            **steps("lean"),
            "drafted_step_over_packed": round(median["lean_drafted_step"] / median["packed_drafted_step"], 3),
            "plain_ms_per_token": round(median["lean_plain_generate"] / GENERATED, 3),
        },
        "engine_plain_ms_per_token": round(median["engine_plain_generate"] / GENERATED, 3),
        "huggingface_generate_ms_per_token": round(median["huggingface_generate"] / GENERATED, 3),
    }
    if rounded is not None:
        plain = int8_bytes(model.base) + layers * cached
        drafted = plain + int8_bytes(model.heads) + head_layers * cached
        row["int8"] = {
            "another_model": INT8_NOTE,
            "copied_bytes": rounded.num_bytes,
            "bytes_plain_step": plain,
            "bytes_drafted_step": drafted,
            "floor_plain_step_ms": round(plain / rate / 1e6, 3),
            "floor_drafted_step_ms": round(drafted / rate / 1e6, 3),
            **{
                f"{kind}_step_over_own_weights": round(
                    statistics.median(_ratios(seconds[f"int8_{kind}_step"], seconds[f"lean_{kind}_step"])), 3
                )
                for kind in ("plain", "drafted")
            },
            **steps("int8", {"plain": plain / rate / 1e6, "drafted": drafted / rate / 1e6}),
        }
        # The limit of a row is that of its own weights.
        del row["int8"]["plain_step_share_of_limit"]
    print(_line(row), file=sys.stderr)
    return row


def _line(row: dict[str, Any]) -> str:
    lean, rounded = row["lean"], row.get("int8")
    told = (
        ""
        if rounded is None
        else f"; int8 {rounded['plain_step_ms']} ms (x{rounded['plain_step_over_own_weights']} of its own weights, share of its "
        f"floor {rounded['plain_step_share_of_floor']}) and {rounded['drafted_step_ms']} ms "
        f"(x{rounded['drafted_step_over_own_weights']}, share {rounded['drafted_step_share_of_floor']})"
    )
    return (
        f"{row['size']} {row['dtype']}, {row['gigabytes_per_second']} GB/s: lean plain step {lean['plain_step_ms']} ms "
        f"(floor {row['floor_plain_step_ms']}, share {lean['plain_step_share_of_floor']}; share of the limit "
        f"{lean['plain_step_share_of_limit']}), {row['positions']}-position step {lean['drafted_step_ms']} ms (floor "
        f"{row['floor_drafted_step_ms']}, share {lean['drafted_step_share_of_floor']}), ratio {lean['drafted_over_plain']} "
        f"(by bytes {row['floor_drafted_over_plain']}); over packed {lean['drafted_step_over_packed']}; eager "
        f"{row['eager']['plain_step_ms']} and {row['eager']['drafted_step_ms']} ms{told}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved measurements per figure")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="shapes to measure")
    parser.add_argument("--int8", action="store_true", help="also steps on weights rounded to int8, another model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "benchmark": "decoding_steps",
        "setting": {
            "context": CONTEXT,
            "batch": 1,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "weights": "random",
            "limit": "reading as many bytes as a plain step reads of weights (the embedding table left out), in huge pages where "
            "there are any; the faster of a sum by torch and a sum by the kernel",
            "instructions": instructions(),
        },
        "rows": rows,
        "provenance": provenance(),
    }
    for name in arguments.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(measure(name, dtype=dtype, repeats=arguments.repeats, int8=arguments.int8))
            if arguments.output:
                arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
