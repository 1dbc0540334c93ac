"""Training tokens/s of n = 4 over n = 1 at equal parameters, beside the ratio that counting FLOPs predicts.

Bytes (vocabulary 258), rows of 512, sizes 10M and 30M of Table S14, float32 and bfloat16 autocast; forward, backward and AdamW
step. Runs of the two models are interleaved in one process; medians over at least five. One JSON document last.

    python benchmarks/training_speed.py [--output benchmarks/results/training_speed.json]
    python benchmarks/training_speed.py --processes 2 --threads 1 [--output benchmarks/results/training_speed_2_processes.json]

With --processes, the same under DDP and FSDP2 over gloo: `batch` rows in each process, tokens of all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headway.data.tokenizers import BYTE_VOCABULARY_SIZE
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import PAPER_SIZES, paper_config
from headway.processes import Processes
from headway.provenance import provenance
from headway.training.launch import joined
from headway.training.parallel import Mode, parallelize
from several_processes import MODES, last_line_of_first

# Gloeckle et al. 2024, Table S5: training time relative to n = 1.
TABLE_S5 = {"0.3B": 1.22, "0.6B": 1.13, "1.3B": 1.12, "3B": 1.07, "6.7B": 1.07, "13B": 1.09}


def flops_per_token(name: str, *, num_future_tokens: int, vocab_size: int, length: int) -> float:
    """Multiply-adds x 2 of forward and backward per token: 6 x weights of layers and unembeddings, plus attention.

    Attention is causal: half of the length^2 score and value products, forward and backward: 6 x layers x length x width.
    """
    size = PAPER_SIZES[name]
    config = paper_config(name, vocab_size=vocab_size)
    layer = 4 * size.dim**2 + 3 * size.dim * config.intermediate_size
    attention = 6 * size.layers * length * size.dim
    return float(6 * (size.layers * layer + num_future_tokens * vocab_size * size.dim) + attention)


class Trainee:
    """One model with its optimizer; `step` is one optimizer step."""

    def __init__(
        self,
        name: str,
        *,
        num_future_tokens: int,
        batch: int,
        length: int,
        bfloat16: bool,
        mode: Mode = "none",
        processes: Processes | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = MultiTokenLM.from_config(
            paper_config(name, vocab_size=BYTE_VOCABULARY_SIZE), MultiTokenConfig(num_future_tokens=num_future_tokens)
        ).train()
        self.parallel = parallelize(
            self.model, mode, processes or Processes(), torch.device("cpu"), heads_may_rest=False
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.tokens = torch.randint(0, 256, (batch, length))
        self.bfloat16 = bfloat16

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
            loss = self.parallel.forward(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def compare(
    name: str,
    *,
    bfloat16: bool,
    batch: int,
    length: int,
    repeats: int,
    mode: Mode = "none",
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Interleave steps of n = 1 and n = 4 and report medians."""
    trainees = {
        n: Trainee(
            name,
            num_future_tokens=n,
            batch=batch,
            length=length,
            bfloat16=bfloat16,
            mode=mode,
            processes=processes,
        )
        for n in (1, 4)
    }
    parameters = {n: trainee.model.num_parameters() for n, trainee in trainees.items()}
    seconds: dict[int, list[float]] = {1: [], 4: []}
    for trainee in trainees.values():
        trainee.step()
        trainee.step()
    for repeat in range(repeats):
        for n in (1, 4) if repeat % 2 == 0 else (4, 1):
            seconds[n].append(trainees[n].step())
    count = 1 if processes is None else processes.count
    rate = {n: count * batch * length / statistics.median(times) for n, times in seconds.items()}
    pair_ratios = [one / four for one, four in zip(seconds[1], seconds[4], strict=True)]
    flops = {
        n: flops_per_token(name, num_future_tokens=n, vocab_size=BYTE_VOCABULARY_SIZE, length=length) for n in (1, 4)
    }
    predicted = flops[1] / flops[4]
    measured = rate[4] / rate[1]
    row = {
        "size": name,
        "parallel": mode,
        "dtype": "bfloat16 autocast" if bfloat16 else "float32",
        "parameters": parameters[4],
        "parameters_equal": parameters[1] == parameters[4],
        "tokens_per_second_n1": round(rate[1], 1),
        "tokens_per_second_n4": round(rate[4], 1),
        "ratio_measured": round(measured, 4),
        "ratio_pairs_quartiles": [round(q, 4) for q in statistics.quantiles(pair_ratios, n=4)],
        "ratio_predicted_by_flops": round(predicted, 4),
        "measured_over_predicted": round(measured / predicted, 4),
    }
    if processes is None or processes.is_main:
        print(json.dumps(row), file=sys.stderr)
    return row


def compare_together(arguments: argparse.Namespace) -> None:
    """Print the row of one cell from all processes that this one is started with."""
    name, dtype, mode = arguments.cell
    with joined("cpu") as (processes, _):
        row = compare(
            name,
            bfloat16=dtype == "bfloat16",
            batch=arguments.batch,
            length=arguments.length,
            repeats=max(5, arguments.repeats),
            mode=mode,
            processes=processes,
        )
    print(json.dumps(row))


def rows_together(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell in processes of its own."""
    rows = []
    for name in arguments.sizes:
        for dtype in ("float32", "bfloat16"):
            for mode in MODES:
                command = [sys.executable, __file__, "--cell", name, dtype, mode]
                for option in ("batch", "length", "repeats", "threads"):
                    command += [f"--{option}", str(getattr(arguments, option))]
                rows.append(json.loads(last_line_of_first(command, processes=arguments.processes)))
    return rows


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved steps per model, at least 5")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--sizes", nargs="+", default=["10M", "30M"], help="of Table S14")
    parser.add_argument("--processes", type=int, default=1, help="train together by DDP and by FSDP2")
    parser.add_argument("--cell", nargs=3, metavar=("SIZE", "DTYPE", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cell:
        compare_together(arguments)
        return
    rows = (
        rows_together(arguments)
        if arguments.processes > 1
        else [
            compare(
                name,
                bfloat16=bfloat16,
                batch=arguments.batch,
                length=arguments.length,
                repeats=max(5, arguments.repeats),
            )
            for name in arguments.sizes
            for bfloat16 in (False, True)
        ]
    )
    predictions = {
        name: round(
            flops_per_token(name, num_future_tokens=4, vocab_size=32000, length=4096)
            / flops_per_token(name, num_future_tokens=1, vocab_size=32000, length=4096),
            3,
        )
        for name in TABLE_S5
    }
    document = {
        "benchmark": "training_speed",
        "setting": {
            "vocabulary": BYTE_VOCABULARY_SIZE,
            "length": arguments.length,
            "batch": arguments.batch,
            "repeats": max(5, arguments.repeats),
            "threads": arguments.threads,
            "processes": arguments.processes,
            "step": "forward, backward, AdamW",
        },
        "rows": rows,
        "target": {"measured_over_predicted_at_least": 0.97},
        "table_s5_time_n4_over_n1": {
            "paper": TABLE_S5,
            "predicted_by_flops_vocabulary_32000_length_4096": predictions,
        },
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
