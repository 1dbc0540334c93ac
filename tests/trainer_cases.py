"""What the tests of other people's loops train on, and how they start a Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tiny_models import random_tokens

LENGTH = 14


def rows(count: int, *, ragged: bool = False, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token rows of equal or of different lengths (from 5 on), some with ignored labels at their start."""
    made = []
    for index, tokens in enumerate(random_tokens(count, LENGTH, seed=seed).tolist()):
        kept = tokens[: 5 + (7 * index) % (LENGTH - 4)] if ragged else tokens
        ignored = index % 3 if ragged else 0
        made.append({"input_ids": kept, "labels": [-100] * ignored + kept[ignored:]})
    return made


def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The usual collation: padded on the right, labels of padding ignored, a mask."""
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch]
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in full])
        for name, value in fill.items()
    }


def trainer(model: Any, folder: Path, *, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """A silent Trainer on the CPU; `options` are those of TrainingArguments, or the Trainer's own datasets and hooks."""
    own = {
        name: options.pop(name)
        for name in (
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "compute_metrics",
            "callbacks",
            "processing_class",
        )
        if name in options
    }
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    } | options
    return kind(
        model=model,
        args=TrainingArguments(**arguments),
        **({"train_dataset": rows(24), "data_collator": pad} | own),
    )


def logged(trained: Trainer, name: str = "loss") -> list[float]:
    """The values of one figure, in the order in which they were logged."""
    return [entry[name] for entry in trained.state.log_history if name in entry]


def copy_of_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
