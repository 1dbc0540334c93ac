"""Peak memory of one training step for n = 1, 2, 4, 8: headway's loss, the naive one, and a checkpoint per head.

Vocabulary 32k, 1024 tokens, chunks of 512 tokens, equal parameter counts (9 layers in all, width 128), float32. Every cell is
a fresh process; what is reported is the peak of the resident memory during forward and backward above the weights, gradients
and inputs that stood before it. One JSON document last.

    python benchmarks/training_memory.py [--output benchmarks/results/training_memory.json]
    python benchmarks/training_memory.py --processes 2 [--output benchmarks/results/training_memory_2_processes.json]

With --processes, headway's loss alone, under DDP and FSDP2 over gloo, 1024 tokens in each process; the largest figure of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from several_processes import MODES, last_line_of_first

SCHEMES = ("headway", "naive", "checkpoint per head", "per-head schedule")
OFFSETS = (1, 2, 4, 8)
LAYERS, WIDTH, HEADS, VOCABULARY, TOKENS, CHUNK = 9, 128, 4, 32000, 1024, 512
MIB = 2**20


def build(num_future_tokens: int) -> Any:
    """The model of a cell."""
    import torch
    from transformers import LlamaConfig

    from headway.model.config import MultiTokenConfig
    from headway.model.multi_token_lm import MultiTokenLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MultiTokenLM.from_config(
        config, MultiTokenConfig(num_future_tokens=num_future_tokens, loss_chunk_tokens=CHUNK)
    ).train()


def measure(scheme: str, num_future_tokens: int) -> float:
    """Peak extra resident MiB of one step in this process."""
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    from headway.functional.targets import shift_targets
    from headway.losses.reference import reference_loss
    from headway.model.per_head import backward_per_head

    torch.set_num_threads(2)
    model = build(num_future_tokens)

    def step(tokens: torch.Tensor) -> None:
        if scheme == "headway":
            model(tokens, labels=tokens).loss.backward()
            return
        if scheme == "per-head schedule":
            backward_per_head(model, tokens, tokens)
            return
        states = model.offset_hidden_states(tokens, use_cache=False)
        raw = [states.last_hidden_BTD, *states.future_hidden]
        if scheme == "naive":
            hidden = [raw[0], *map(model.final_norm, raw[1:])]
            reference_loss(hidden, model.family.lm_head.weight, tokens).backward()  # type: ignore[no-untyped-call]
            return

        def head_loss(hidden: torch.Tensor, offset: int) -> torch.Tensor:
            normed = hidden if offset == 1 else model.final_norm(hidden)
            targets = shift_targets(tokens, offset=offset)
            return F.cross_entropy(model.unembed(normed).flatten(0, 1), targets.flatten())

        losses = [checkpoint(head_loss, hidden, k, use_reentrant=False) for k, hidden in enumerate(raw, start=1)]
        sum(losses).backward()

    tokens = torch.randint(0, VOCABULARY, (2, TOKENS // 2))
    step(torch.randint(0, VOCABULARY, (1, 8)))  # allocates gradients and library buffers
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
    reset_peak()
    before = resident("VmRSS")
    step(tokens)
    return (resident("VmHWM") - before) / MIB


def measure_together(mode: str, num_future_tokens: int) -> float:
    """Peak extra resident MiB of one step, the largest of the processes that this one is started with."""
    import torch

    from headway.training.launch import joined
    from headway.training.parallel import parallelize

    torch.set_num_threads(1)
    with joined("cpu") as (processes, device):
        model = build(num_future_tokens)
        parallel = parallelize(model, mode, processes, device, heads_may_rest=False)  # type: ignore[arg-type]
        torch.manual_seed(processes.rank)
        for size in ((1, 8), (2, TOKENS // 2)):
            tokens = torch.randint(0, VOCABULARY, size)
            reset_peak()
            before = resident("VmRSS")
            parallel.forward(input_ids=tokens, labels=tokens).loss.backward()
            peak = resident("VmHWM") - before
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        return processes.largest(peak) / MIB


def reset_peak() -> None:
    """Make VmHWM start from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Run every cell in its own process and print the table and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--repeats", type=int, default=3, help="processes per cell; the median is reported")
    parser.add_argument("--processes", type=int, default=1, help="train together by DDP and by FSDP2")
    parser.add_argument("--cell", nargs=2, metavar=("SCHEME", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        together = arguments.cell[0] in MODES
        print((measure_together if together else measure)(arguments.cell[0], int(arguments.cell[1])))
        return
    from headway.provenance import provenance

    # Freed chunks go back to the system at once, so that the peak is what is alive and not what the allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks: dict[str, dict[str, float]] = {}
    for scheme in SCHEMES if arguments.processes == 1 else MODES:
        peaks[scheme] = {}
        for n in OFFSETS:
            command = [sys.executable, __file__, "--cell", scheme, str(n)]
            runs = [
                float(last_line_of_first(command, processes=arguments.processes, environment=environment))
                for _ in range(arguments.repeats)
            ]
            peaks[scheme][str(n)] = round(statistics.median(runs), 1)
            print(f"{scheme:20} n={n}  {peaks[scheme][str(n)]:8.1f} MiB", file=sys.stderr)
    ratios = {scheme: round(peaks[scheme]["8"] / peaks[scheme]["1"], 3) for scheme in peaks}
    document = {
        "benchmark": "training_memory",
        "unit": "MiB above weights, gradients and inputs, median",
        "setting": {
            "vocabulary": VOCABULARY,
            "tokens": TOKENS,
            "chunk_tokens": CHUNK,
            "layers_in_all": LAYERS,
            "width": WIDTH,
            "dtype": "float32",
            "repeats": arguments.repeats,
            "processes": arguments.processes,
        },
        "peak_mib": peaks,
        **({"headway_n8_over_n1": ratios["headway"]} if arguments.processes == 1 else {"n8_over_n1": ratios}),
        "targets": {"n8_over_n1_at_most": 1.20, "n1_mib_at_most": 220},
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
