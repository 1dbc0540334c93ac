"""Measure the peak memory of training steps beside the plan's estimate, one JSON line per setting.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python tests/training_peak.py '{"precision": "bfloat16"}' ...

A program of its own: the peak of a process that has run other things would be theirs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from headway.data.tokenizers import load_tokenizer
from headway.training.config import TrainConfig
from headway.training.estimate import plan_training
from headway.training.model_building import base_config, fresh_model
from headway.training.optimizers import TrainingOptimizer
from headway.training.precision import forward_precision

FIELDS: dict[str, Any] = {
    "hidden_size": 256,
    "num_layers": 6,
    "num_heads": 4,
    "num_future_tokens": 4,
    "tokenizer": "integers:3000",
    "sequence_length": 256,
    "batch_size": 8,
}
TINY = {"hidden_size": 16, "num_heads": 2, "sequence_length": 16, "batch_size": 1}


def peak_bytes(config: TrainConfig) -> int:
    """Peak of the resident memory above what stood before the model was built."""
    before = resident("VmRSS")
    model = fresh_model(config, base_config(config, load_tokenizer(config.tokenizer_name))).train()
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = TrainingOptimizer(model, config)
    ids_BT = torch.randint(0, 256, (config.batch_size, config.sequence_length))
    for step in range(2):
        if step == 1:  # with moments; VmHWM starts from here
            Path("/proc/self/clear_refs").write_text("5")
        with forward_precision(model, config.precision):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Measure each setting that is given."""
    torch.set_num_threads(1)
    for setting in map(json.loads, sys.argv[1:]):
        fields = FIELDS | setting
        peak_bytes(TrainConfig(**(fields | TINY)))  # buffers of libraries
        config = TrainConfig(**fields)
        estimate = plan_training(config).memory.total
        record = {"setting": setting, "estimate": estimate, "measured": peak_bytes(config)}
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
