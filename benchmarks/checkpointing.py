"""Seconds to save and to resume a training checkpoint, its size on disk, and what that is of a training step.

Sizes 10M and 30M of Table S14 (bytes, n = 4, AdamW, float32). Saving is everything that a run does at a checkpoint: weights,
moments, checksums, fsync, the move, the removal of the oldest. Resuming is everything before the next step: checksums, weights,
moments, random states. The step is one of forward, backward and update in the same process. Medians. One JSON document last.

    python benchmarks/checkpointing.py [--output benchmarks/results/checkpointing.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from headway.data.cores import usable_cores
from headway.data.tokenizers import byte_tokenizer
from headway.provenance import provenance
from headway.training.checkpoint import RunState, newest_checkpoint, write_checkpoint
from headway.training.config import TrainConfig
from headway.training.model_building import base_config, fresh_model
from headway.training.optimizers import TrainingOptimizer


def seconds_of(action: Callable[[], Any]) -> float:
    """Wall time."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(size: str, folder: Path, *, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """One model: steps, saves and resumes in turn."""
    config = TrainConfig(size=size, batch_size=batch, sequence_length=length)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = fresh_model(config, base_config(config, tokenizer)).train()
    optimizer = TrainingOptimizer(model, config)
    tokens = torch.randint(0, 256, (batch, length))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(number: int) -> None:
        write_checkpoint(
            folder,
            model=model,
            tokenizer=tokenizer,
            optimizer=optimizer,
            state=RunState(step=number, next_row=number * batch),
            config=config.to_dict(),
            identity={},
            keep=2,
        )

    def resume() -> None:
        checkpoint, _ = newest_checkpoint(folder)
        assert checkpoint is not None, "one was written"
        checkpoint.restore(model, optimizer)

    step()
    times: dict[str, list[float]] = {"step": [], "save": [], "resume": []}
    for number in range(1, repeats + 1):
        times["step"].append(seconds_of(step))
        times["save"].append(seconds_of(lambda number=number: save(number)))  # type: ignore[misc]
        times["resume"].append(seconds_of(resume))
    newest, _ = newest_checkpoint(folder)
    assert newest is not None, "one was written"
    on_disk = sum(path.stat().st_size for path in newest.path.rglob("*") if path.is_file())
    medians = {name: statistics.median(values) for name, values in times.items()}
    row = {
        "size": size,
        "parameters": model.num_parameters(),
        "bytes_on_disk": on_disk,
        "bytes_per_parameter": round(on_disk / model.num_parameters(), 2),
        **{f"{name}_seconds": round(value, 4) for name, value in medians.items()},
        "save_quartiles": [round(value, 4) for value in statistics.quantiles(times["save"], n=4)],
        "resume_quartiles": [round(value, 4) for value in statistics.quantiles(times["resume"], n=4)],
        "save_over_step": round(medians["save"] / medians["step"], 3),
        "save_megabytes_per_second": round(on_disk / 1e6 / medians["save"], 1),
        "share_of_time_at_every_500_steps": round(medians["save"] / (medians["save"] + 500 * medians["step"]), 6),
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--sizes", default="10M,30M", help="rows of Table S14, comma-separated")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=9, help="at least 5")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of torch")
    parser.add_argument("--folder", type=Path, help="write below here; default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    repeats, load_before = max(5, arguments.repeats), os.getloadavg()
    rows = []
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            shape = {"batch": arguments.batch, "length": arguments.length, "repeats": repeats}
            rows.append(measure(size, Path(name), **shape))
    document = {
        "benchmark": "checkpointing",
        "setting": {
            "batch": arguments.batch,
            "length": arguments.length,
            "repeats": repeats,
            "threads": arguments.threads,
            "optimizer": "adamw",
            "dtype": "float32",
        },
        "rows": rows,
        "load_average_before_and_after": [round(load_before[0], 2), round(os.getloadavg()[0], 2)],
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
