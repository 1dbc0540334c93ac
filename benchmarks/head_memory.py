"""Peak memory of a training step for every head type over n = 1, 2, 4, 8, 16, 32, and of n = 32 on bytes.

Fixed small shape (36 layers in all, width 64, vocabulary 8192, 512 tokens, chunks of 256 tokens, float32). Every cell is a
fresh process. Per cell: the peak of the resident memory during forward and backward above the weights, gradients and inputs
that stood before it; and what weights, gradients and AdamW's moments take, which the step itself does not: that is where
replicated unembeddings grow, by one vocabulary matrix per offset. Then one AdamW step of a 126M-parameter byte model with
n = 32, as a whole process. One JSON document last.

    python benchmarks/head_memory.py [--output benchmarks/results/head_memory.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HEADS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "transformer causal": {"wiring": "causal"},
    "transformer anticausal": {"wiring": "anticausal"},
    "transformer + markov bias": {"markov_rank": 16},
    "linear": {"heads": "linear"},
    "replicated_unembedding": {"heads": "replicated_unembedding"},
    "medusa": {"heads": "medusa"},
    "medusa, shared unembedding": {"heads": "medusa", "own_unembedding": False},
    "hydra, shared unembedding": {"heads": "hydra", "own_unembedding": False},
    "sequential": {"heads": "sequential"},
    "sequential, one shared module": {"heads": "sequential", "share_modules": True},
}
OFFSETS = (1, 2, 4, 8, 16, 32)
LAYERS, WIDTH, VOCABULARY, TOKENS, CHUNK = 36, 64, 8192, 512, 256
BYTE_HEADS = ("transformer", "replicated_unembedding")
BYTE_LAYERS, BYTE_WIDTH, BYTE_VOCABULARY, BYTE_TOKENS, BYTE_OFFSETS = 40, 512, 258, 4096, 32
STATE_BYTES = 16  # weight, gradient and AdamW's two moments, float32
MIB = 2**20
LIMIT_GIB = 24


def build(name: str, num_future_tokens: int, *, layers: int, width: int, vocabulary: int) -> Any:
    """The model of a cell in train mode; heads with decoder layers take them from the trunk."""
    import torch
    from transformers import LlamaConfig

    from headway.model.config import MultiTokenConfig
    from headway.model.multi_token_lm import MultiTokenLM

    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    options = MultiTokenConfig(num_future_tokens=num_future_tokens, loss_chunk_tokens=CHUNK, **HEADS[name])
    return MultiTokenLM.from_config(config, options).train()


def cell(name: str, num_future_tokens: int) -> dict[str, float]:
    """Peak extra resident MiB of forward and backward in this process, and the MiB of the state."""
    import torch

    model = build(name, num_future_tokens, layers=LAYERS, width=WIDTH, vocabulary=VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS))
    short = tokens[:, : 2 * num_future_tokens + 2]
    model(short, labels=short).loss.backward()  # allocates gradients and library buffers
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
    reset_peak()
    before = resident("VmRSS")
    model(tokens, labels=tokens).loss.backward()
    return {
        "step_mib": (resident("VmHWM") - before) / MIB,
        "state_mib": model.num_parameters() * STATE_BYTES / MIB,
    }


def byte_step(name: str) -> dict[str, float]:
    """One AdamW step of the byte model: parameters, seconds, and the whole process's peak."""
    import torch

    model = build(name, BYTE_OFFSETS, layers=BYTE_LAYERS, width=BYTE_WIDTH, vocabulary=BYTE_VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = torch.randint(0, BYTE_VOCABULARY, (4, BYTE_TOKENS // 4))
    began = time.perf_counter()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return {
        "parameters": model.num_parameters(),
        "loss": float(loss.detach()),
        "seconds": round(time.perf_counter() - began, 1),
        "process_peak_gib": round(resident("VmHWM") / 2**30, 2),
    }


def reset_peak() -> None:
    """Make VmHWM start from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_process(*arguments: str) -> dict[str, float]:
    """Run this file in a fresh process; what it prints."""
    # Freed chunks go back to the system at once, so that the peak is what is alive and not what the allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(printed))


def measured_before(output: Path | None, setting: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The cells in an earlier document of the same setting, which are not measured again."""
    if output is None or not output.is_file():
        return {}
    document = json.loads(output.read_text(encoding="utf-8"))
    return dict(document["peak"]) if document["setting"] == setting else {}


def main() -> None:
    """Run every cell in its own process and print the table and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, help="also write the JSON document here; cells in it are not measured again"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes per cell; the median is reported")
    parser.add_argument("--heads", action="append", choices=list(HEADS), help="only these; repeatable")
    parser.add_argument("--offsets", type=int, action="append", help="only these n; repeatable")
    parser.add_argument("--no-bytes", action="store_true", help="leave the byte model out (it takes several GiB)")
    parser.add_argument("--cell", nargs=2, metavar=("HEADS", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--byte-step", metavar="HEADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(arguments.cell[0], int(arguments.cell[1]))))
        return
    if arguments.byte_step:
        print(json.dumps(byte_step(arguments.byte_step)))
        return
    from headway.provenance import provenance

    setting = {
        "layers_in_all": LAYERS,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "tokens": TOKENS,
        "chunk_tokens": CHUNK,
        "dtype": "float32",
        "repeats": arguments.repeats,
    }
    table = measured_before(arguments.output, setting)
    for name in arguments.heads or HEADS:
        row = table.setdefault(name, {})
        for n in arguments.offsets or OFFSETS:
            if str(n) in row:
                continue
            runs = [in_process("--cell", name, str(n)) for _ in range(arguments.repeats)]
            figures = {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
            row[str(n)] = figures
            print(
                f"{name:30} n={n:<3} step {figures['step_mib']:8.1f} MiB   weights, gradients, moments "
                f"{figures['state_mib']:8.1f} MiB",
                file=sys.stderr,
            )
    ratios = {
        name: round(row["32"]["step_mib"] / row["1"]["step_mib"], 3)
        for name, row in table.items()
        if {"1", "32"} <= row.keys()
    }
    document: dict[str, Any] = {
        "benchmark": "head_memory",
        "unit": "MiB; step: peak of forward and backward above weights, gradients and inputs, median; state: "
        "weights, gradients and AdamW's moments, counted",
        "setting": setting,
        "peak": table,
        "step_n32_over_n1": ratios,
    }
    if not arguments.no_bytes:
        document["bytes_n32"] = {
            "layers_in_all": BYTE_LAYERS,
            "width": BYTE_WIDTH,
            "vocabulary": BYTE_VOCABULARY,
            "bytes_per_step": BYTE_TOKENS,
            "limit_gib": LIMIT_GIB,
            "heads": {name: in_process("--byte-step", name) for name in BYTE_HEADS},
        }
        for name, figures in document["bytes_n32"]["heads"].items():
            print(f"bytes, n=32, {name}: peak {figures['process_peak_gib']} GiB of the process", file=sys.stderr)
    document["provenance"] = provenance()
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
