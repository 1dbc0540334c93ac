"""Tokens per second of the loader alone, beside what a 10M model of Table S14 consumes on the same machine in the same run.

Rows of windows, rows of whole documents and a mixture of both, without and with threads that make batches ahead; then
forward, backward and AdamW step of the 10M model (bytes, n = 4). Medians. With --encode also MB/s of tokenising with a BPE
tokenizer in one process and in one per core. One JSON document last.

    python benchmarks/loader.py [--encode] [--output benchmarks/results/loader.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.data.cores import usable_cores
from headway.data.document import Document
from headway.data.loader import PackedLoader
from headway.data.mixture import Mixture, MixturePart
from headway.data.packing import PackedTokens, Rows
from headway.data.prefetch import PrefetchingLoader
from headway.data.sources import standard_library
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import BYTE_VOCABULARY_SIZE, byte_tokenizer, train_bpe_tokenizer
from headway.data.whole_documents import PackedDocuments
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import paper_config
from headway.provenance import provenance

TARGET_RATIO = 20.0


def texts(megabytes: int, *, prompts: bool) -> Iterator[Document]:
    """Random bytes in documents of 4 KB on average, with prompts of a quarter where they are asked for."""
    random = np.random.default_rng(0)
    left = megabytes * 1_000_000
    number = 0
    while left > 0:
        size = int(random.integers(100, 8000 if not prompts else 500))
        yield Document(f"{number}", "g", random.bytes(size), prompt_bytes=size // 4 if prompts else 0)
        left -= size
        number += 1


def sources(folder: Path, *, megabytes: int, length: int) -> dict[str, Rows]:
    """Rows of each kind."""
    plain = build_token_cache(texts(megabytes, prompts=False), byte_tokenizer(), folder / "plain")
    examples = build_token_cache(texts(megabytes // 4, prompts=True), byte_tokenizer(), folder / "examples")
    windows = PackedTokens(plain, sequence_length=length, seed=0)
    whole = PackedDocuments(examples, sequence_length=length, seed=0)
    mixture = Mixture([MixturePart("windows", windows, 0.7), MixturePart("examples", whole, 0.3)], seed=0)
    return {"windows": windows, "whole documents": whole, "mixture": mixture}


def median_rate(batch: Callable[[int], object], *, tokens: int, stride: int, repeats: int) -> float:
    """Tokens per second: the median over repeats of 20 batches each."""
    batch(0)
    rates = []
    for repeat in range(repeats):
        start = time.perf_counter()
        for number in range(20):
            batch((1 + repeat * 20 + number) * stride)
        rates.append(20 * tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def consumption(*, batch: int, length: int, bfloat16: bool, repeats: int) -> float:
    """Tokens per second of training steps of the 10M model."""
    torch.manual_seed(0)
    model = MultiTokenLM.from_config(
        paper_config("10M", vocab_size=BYTE_VOCABULARY_SIZE), MultiTokenConfig(num_future_tokens=4)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, 256, (batch, length))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return batch * length / statistics.median(seconds[2:])


def encoding(folder: Path) -> dict[str, Any]:
    """MB/s of building a cache of the standard library, three times over, with a BPE tokenizer of 4096 tokens."""
    library = [document.data for document in standard_library()]
    tokenizer = train_bpe_tokenizer(library[:200], vocabulary_size=4096)
    documents = [Document(f"{turn}/{number}", "g", data) for turn in range(3) for number, data in enumerate(library)]
    size = sum(document.num_bytes for document in documents)
    rates = {}
    for workers in dict.fromkeys((1, usable_cores())):
        start = time.perf_counter()
        build_token_cache(documents, tokenizer, folder / f"bpe-{workers}", workers=workers)
        rates[str(workers)] = round(size / 1e6 / (time.perf_counter() - start), 2)
    return {"megabytes": round(size / 1e6, 1), "megabytes_per_second_by_workers": rates}


def main() -> None:
    """Print the rates and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--megabytes", type=int, default=64, help="of text behind the rows")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=7, help="at least 5")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of torch in the training step")
    parser.add_argument("--encode", action="store_true", help="measure tokenising too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = max(5, arguments.repeats)
    shape = {"batch": arguments.batch, "length": arguments.length}
    tokens = arguments.batch * arguments.length
    load_before = os.getloadavg()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, rows in sources(folder, megabytes=arguments.megabytes, length=arguments.length).items():
            loader = PackedLoader(rows, batch_size=arguments.batch)
            rates[kind] = median_rate(loader.batch, tokens=tokens, stride=arguments.batch, repeats=repeats)
            with PrefetchingLoader(loader, workers=2) as ahead:
                rates[f"{kind}, 2 threads ahead"] = median_rate(
                    ahead.batch, tokens=tokens, stride=arguments.batch, repeats=repeats
                )
        encoded = encoding(folder) if arguments.encode else None
    consumed = {
        "float32": consumption(**shape, bfloat16=False, repeats=repeats),
        "bfloat16 autocast": consumption(**shape, bfloat16=True, repeats=repeats),
    }
    slowest = min(rate for kind, rate in rates.items() if "ahead" not in kind)
    ratio = slowest / max(consumed.values())
    for kind, rate in {**rates, **{f"10M model, {dtype}": rate for dtype, rate in consumed.items()}}.items():
        print(f"{kind:40} {rate:14,.0f} tokens/s", file=sys.stderr)
    document = {
        "benchmark": "loader",
        "setting": shape | {"megabytes": arguments.megabytes, "repeats": repeats, "threads": arguments.threads},
        "loader_tokens_per_second": {kind: round(rate) for kind, rate in rates.items()},
        "model_10M_n4_tokens_per_second": {dtype: round(rate, 1) for dtype, rate in consumed.items()},
        "slowest_loader_over_fastest_model": round(ratio, 1),
        "target": {"slowest_loader_over_fastest_model_at_least": TARGET_RATIO, "met": ratio >= TARGET_RATIO},
        "encoding": encoded,
        "load_average_before_and_after": [round(load_before[0], 2), round(os.getloadavg()[0], 2)],
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
