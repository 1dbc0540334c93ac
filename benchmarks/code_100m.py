"""The recipe code-100m for some minutes on one GPU: tokens/s, MFU and peak memory of n = 1 and n = 4, and what it accepts.

Trains the recipe on source files of the machine (the Python standard library, or --data): a short run with n = 1 and one with
n = 4 measure speed and memory; then n = 4 trains in the time that is left, with a schedule of as many steps as fit, and is
evaluated on held-out text. Every run is a `headway train` process of its own, so that its peak memory is its own. On a GPU memory
is what tensors had at most, on a CPU the most that was resident. One JSON document last.

    python benchmarks/code_100m.py [--minutes 8] [--output benchmarks/results/code_100m.json] [-- further train options]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from headway.provenance import provenance
from headway.training.metric_files import read_metrics

AIMED_MFU = 0.40
# Of the minutes, for evaluation, saving and starting a process.
RESERVED = 0.15


def train(folder: Path, name: str, options: dict[str, Any], extra: list[str]) -> dict[str, Any]:
    """Run `headway train`; its result and what its metrics say."""
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    output = folder / name
    command = [sys.executable, "-m", "headway", "train", *flags, *extra, "--output", str(output), "--overwrite"]
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    steps = read_metrics(output / "metrics.jsonl")
    # The first logged step carries what was allocated and tuned for the first time.
    steady = steps[1:] or steps
    gpu = [step["gpu_peak_bytes"] for step in steps if step["gpu_peak_bytes"]]
    mfu = [step["mfu"] for step in steady if step["mfu"]]
    resident = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, before) * 1024
    return {
        "steps": result["steps"],
        "tokens": result["tokens"],
        "parameters": result["num_parameters"],
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in steady), 1),
        "mfu": round(statistics.median(mfu), 4) if mfu else None,
        "peak_memory_gib": round((max(gpu) if gpu else resident) / 2**30, 3),
        "peak_memory_of": "tensors on the GPU" if gpu else "resident, most of the processes so far",
        "evaluation": result["evaluation"],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Run the three trainings and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--recipe", default="code-100m", help="of headway train")
    parser.add_argument("--data", default="stdlib", help="files, a folder or stdlib")
    parser.add_argument("--probe-steps", type=int, default=20, help="of the short runs, at least 3")
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("extra", nargs="*", help="further options of headway train, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        document = measure(arguments.folder or Path(temporary), arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of n = 1 and n = 4, then as long a run as fits."""
    deadline = time.monotonic() + 60 * arguments.minutes
    common = {
        "recipe": arguments.recipe,
        "data": arguments.data,
        "cache-directory": folder / "tokens",
        "log-every-steps": 2,
        "mfu-peak": "auto" if torch.cuda.is_available() else "measure",
        "checkpoint-every-steps": "none",
    }
    probe = {
        "steps": max(3, arguments.probe_steps),
        "warmup-steps": 1,
        "eval-every-steps": "none",
    }
    speed = {
        n: train(folder, f"probe-n{n}", common | probe | {"num-future-tokens": n}, arguments.extra) for n in (1, 4)
    }
    per_step = speed[4]["tokens"] / speed[4]["steps"]
    left = deadline - time.monotonic() - 60 * arguments.minutes * RESERVED
    steps = max(4, int(left * speed[4]["tokens_per_second"] / per_step))
    whole = {"steps": steps, "warmup-steps": max(1, steps // 12), "num-future-tokens": 4, "eval-every-steps": steps}
    trained = train(folder, "trained-n4", common | whole, arguments.extra)
    evaluation = trained["evaluation"]
    return {
        "benchmark": "code_100m",
        "setting": {
            "minutes": arguments.minutes,
            "recipe": arguments.recipe,
            "data": arguments.data,
            "extra": arguments.extra,
            "tokens_per_step": per_step,
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "speed_n1": speed[1],
        "speed_n4": speed[4],
        "time_n4_over_n1": round(speed[1]["tokens_per_second"] / speed[4]["tokens_per_second"], 4),
        "memory_n4_over_n1": round(speed[4]["peak_memory_gib"] / speed[1]["peak_memory_gib"], 4),
        "trained_n4": trained,
        "held_out_nats_per_offset": evaluation.get("nats"),
        "held_out_tokens_per_forward": evaluation.get("walk_acceptance_length"),
        "decoded_tokens_per_forward": evaluation.get("decoded_acceptance_length"),
        "target": {"mfu_at_least": AIMED_MFU, "met": (trained["mfu"] or 0) >= AIMED_MFU},
        "provenance": provenance(),
    }


if __name__ == "__main__":
    main()
