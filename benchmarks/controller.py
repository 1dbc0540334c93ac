"""Whether `num_draft_tokens="auto"` is ever slower than plain decoding: batches 1 to 32, three kinds of text, on and off.

Weights are random and drafts are scripted, so that acceptance per offset is what the kind of text says: 0.9 (predictable), 0.02
(random), or both in turn, 64 tokens each (alternating). Costs are real: heads run wherever they would run, and only what they
drafted is replaced. A figure is seconds of plain decoding over seconds of the same tokens with drafts, prefill apart; the arms
take turns, in an order that rotates. The lower bound is that of a one-sided 95 % t interval of the mean.

    python benchmarks/controller.py [--output benchmarks/results/controller.json]

One JSON document last.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding_steps import SHAPES, build
from headway.decoding.blocks import stream_blocks
from headway.decoding.drafting import Block, ChainDrafter, Standing
from headway.provenance import provenance

PROMPT = 32
TEXTS = {
    "predictable": lambda place: 0.9,
    "random": lambda place: 0.02,
    "alternating": lambda place: 0.9 if place // 64 % 2 == 0 else 0.02,
}
DRAFTS = 3
SIZES = [name for name, shape in SHAPES.items() if shape.future_tokens == DRAFTS + 1]
ARMS: dict[str, int | str] = {"plain": 0, "longest": DRAFTS, "auto": "auto"}
# Quantile 0.95 of Student's t by degrees of freedom, at some places; the next smaller one is used, which is on the safe side.
STUDENT = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 6: 1.943, 9: 1.833, 14: 1.761, 19: 1.729, 29: 1.699, 59: 1.671}


@contextmanager
def scripted(truth: Sequence[Sequence[int]], text: str, *, vocabulary: int, seed: int) -> Iterator[None]:
    """Let drafts of the known continuation be right as often as the kind of text says."""
    rng, block = random.Random(seed), ChainDrafter.block

    def drafted(self: ChainDrafter, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        found = block(self, standing, last_B1, depth=depth)
        rows = []
        for own, made in zip(truth, standing.made, strict=True):
            following = [*own[made : made + found.depth], *[0] * found.depth][: found.depth]
            right = [rng.random() < TEXTS[text](made + place) for place in range(found.depth)]
            rows.append(
                [token if good else (token + 1) % vocabulary for token, good in zip(following, right, strict=True)]
            )
        return Block(torch.cat((last_B1, torch.tensor(rows)), dim=1))

    ChainDrafter.block = drafted  # type: ignore[method-assign]
    try:
        yield
    finally:
        ChainDrafter.block = block  # type: ignore[method-assign]


def decode(model: Any, ids: Tensor, arm: str, *, new: int, executor: str) -> tuple[float, Any]:
    """Seconds after the prefill, and the result."""
    stream = stream_blocks(
        model, ids, num_draft_tokens=ARMS[arm], max_new_tokens=new, do_sample=False, executor=executor
    )
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start, stream.result


def bound(ratios: Sequence[float]) -> float:
    """Lower end of the one-sided 95 % interval of the mean."""
    quantile = STUDENT[max(degrees for degrees in STUDENT if degrees <= len(ratios) - 1)]
    return statistics.mean(ratios) - quantile * statistics.stdev(ratios) / math.sqrt(len(ratios))


def measure(model: Any, batch: int, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    vocabulary = SHAPES[arguments.size].vocabulary
    torch.manual_seed(batch)
    ids = torch.randint(0, vocabulary, (batch, PROMPT))
    _, plain = decode(model, ids, "plain", new=arguments.tokens, executor=arguments.executor)
    truth = plain.sequences[:, PROMPT:].tolist()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    lengths: Counter[int] = Counter()
    differing = 0
    for repeat in range(arguments.repeats + 1):
        order = list(ARMS)
        order = order[repeat % 3 :] + order[: repeat % 3]
        for arm in order:
            with scripted(truth, text, vocabulary=vocabulary, seed=repeat):
                took, result = decode(model, ids, arm, new=arguments.tokens, executor=arguments.executor)
            # The first turn warms up, and leaves the controller the costs that a process knows after its first request.
            if repeat:
                seconds[arm].append(took)
                differing += int((result.sequences[:, PROMPT:] != plain.sequences[:, PROMPT:]).any(dim=1).sum())
                if arm == "auto":
                    lengths.update(result.control.lengths[1:])
    ratios = {
        arm: [before / after for before, after in zip(seconds["plain"], seconds[arm], strict=True)]
        for arm in ("longest", "auto")
    }
    row = {
        "batch": batch,
        "text": text,
        "plain_seconds": round(statistics.median(seconds["plain"]), 4),
        **{
            f"{arm}_over_plain": {
                "mean": round(statistics.mean(own), 4),
                "lower_bound_95": round(bound(own), 4),
                "least": round(min(own), 4),
            }
            for arm, own in ratios.items()
        },
        "lengths_chosen": {str(length): lengths[length] for length in sorted(lengths)},
        "rows_that_differ_from_plain": differing,
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--size", default="10M", choices=SIZES, help="shape of the random model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="rows per batch")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=list(TEXTS), help="kinds of text")
    parser.add_argument("--tokens", type=int, default=384, help="new tokens per row")
    parser.add_argument("--repeats", type=int, default=30, help="paired turns, at least 2")
    parser.add_argument("--executor", default="lean", choices=["eager", "lean"], help="what runs the model")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats needs at least 2, for a spread")
    torch.set_num_threads(arguments.threads)
    model = build(SHAPES[arguments.size], torch.float32)
    rows = [measure(model, batch, text, arguments) for batch in arguments.batches for text in arguments.texts]
    document = {
        "benchmark": "controller",
        "setting": {
            "size": arguments.size,
            "dtype": "float32",
            "executor": arguments.executor,
            "threads": arguments.threads,
            "prompt_tokens": PROMPT,
            "new_tokens": arguments.tokens,
            "drafted_tokens": DRAFTS,
            "repeats": arguments.repeats,
            "weights": "random",
            "drafts": "scripted: acceptance is simulated, costs are real",
        },
        "rows": rows,
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
