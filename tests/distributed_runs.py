"""Whole runs on two processes, for `tests/training/test_parallel_runs.py`: what they leave is compared there.

One pair of processes does all runs, one after the other, since starting a pair takes longer than they do.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.evaluation.periodic import held_out_evaluators
from headway.training import run as run_module
from headway.training.compilation import has_cpp_compiler
from headway.training.config import TrainConfig
from headway.training.events import Event, Notice
from headway.training.loop import train
from small_runs import run_fields

EVALUATION = {"eval_every_steps": 3, "eval_rows": 5, "eval_prompts": 3, "eval_prompt_tokens": 8, "eval_new_tokens": 8}
WITH_DROPOUT = {"hidden_size": None, "num_layers": None, "num_heads": None, "gradient_accumulation_steps": 2}
RESTING = {"weight_schedule": "forward_curriculum", "optimizer": "muon"}


def settings(corpus: Path, folder: Path, name: str, **overrides: Any) -> TrainConfig:
    """A run of six steps of two micro-batch rows per process, whose text is encoded once for all."""
    fields = run_fields(corpus, folder / name, cache_directory=str(folder / "tokens"), device="cpu")
    return TrainConfig(**fields | overrides)


def evaluators(data: Any) -> list[Any]:
    return held_out_evaluators(data.held_out, sequence_length=48, rows=5, prompts=3, prompt_tokens=8, new_tokens=8)


class Pair:
    """One of the two processes."""

    def __init__(self, rank: int, corpus: str, folder: str) -> None:
        self.rank, self.corpus, self.folder = rank, Path(corpus), Path(folder)
        self.notes: dict[str, Any] = {}

    def run(self, name: str, **overrides: Any) -> str:
        """How the run `name` ended in this process: 'finished', or its error; with what it said of itself."""
        heard: list[str] = []

        def listen(event: Event) -> None:
            if isinstance(event, Notice):
                heard.append(event.text)

        config = settings(self.corpus, self.folder, name, **overrides)
        try:
            train(config, evaluators=evaluators if config.eval_every_steps else (), on_event=listen)
            end = "finished"
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        self.notes.setdefault(name, []).append({"end": end, "heard": heard})
        return end

    def stopped(self, name: str, *, at: int, **overrides: Any) -> None:
        """A run that SIGTERM ends in the middle of step `at`, sent to the second process only."""
        self._during(at, lambda batches: self.rank == 1 and signal.raise_signal(signal.SIGTERM), name, **overrides)

    def poisoned(self, name: str, *, at: int, **overrides: Any) -> None:
        """A run in which the second process alone meets a loss that is not finite, in step `at`."""

        def poison(parallel: Any) -> None:
            if self.rank == 1:
                forward = parallel.forward

                def broken(**inputs: Any) -> Any:
                    output = forward(**inputs)
                    output.loss = output.loss * torch.inf
                    return output

                parallel.forward = broken

        self._during(at, poison, name, **overrides)

    def _during(self, at: int, act: Callable[[Any], Any], name: str, **overrides: Any) -> None:
        real, calls = run_module.optimizer_step, []

        def step(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) != at:
                return real(*args, **options)
            act(options["parallel"])
            try:
                return real(*args, **options)
            finally:
                vars(options["parallel"]).pop("forward", None)

        run_module.optimizer_step = step
        try:
            self.run(name, **overrides)
        finally:
            run_module.optimizer_step = real


def do_all(rank: int, corpus: str, folder: str) -> None:
    """All runs; each process leaves what it heard in heard-RANK.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pair = Pair(rank, corpus, folder)
    for mode in ("ddp", "fsdp"):
        pair.run(mode, parallel=mode, **EVALUATION)
        pair.run(f"{mode}-resting", parallel=mode, **RESTING)
        drawn: dict[str, Any] = {
            "parallel": mode,
            "base_config": f"{folder}/shape",
            "optimizer": "muon",
            **WITH_DROPOUT,
        }
        pair.run(f"{mode}-straight", **drawn)
        pair.stopped(f"{mode}-stopped", at=4, checkpoint_every_steps=None, **drawn)
        pair.run(f"{mode}-stopped", checkpoint_every_steps=None, **drawn)
        pair.poisoned(f"{mode}-poisoned", at=2, parallel=mode)
        if has_cpp_compiler():
            compiled: dict[str, Any] = {"parallel": mode, "compile": "on", "checkpoint_every_steps": None}
            pair.run(f"{mode}-compiled", **compiled)
            pair.stopped(f"{mode}-compiled-stopped", at=4, **compiled)
            pair.run(f"{mode}-compiled-stopped", **compiled)
    pair.stopped("fsdp-then-ddp", at=4, parallel="fsdp")
    pair.run("fsdp-then-ddp", parallel="ddp")
    pair.stopped("fsdp-then-one", at=4, parallel="fsdp")
    pair.run("one-then-fsdp", parallel="fsdp", gradient_accumulation_steps=2)
    pair.run("one-then-two", parallel="ddp", batch_size=4)
    pair.run("ddp", parallel="ddp")
    _damage(rank, Path(folder, "fsdp-damaged"), pair)
    pair.run("none", parallel="none")
    Path(folder, f"heard-{rank}.json").write_text(json.dumps(pair.notes), encoding="utf-8")
    dist.destroy_process_group()


def _damage(rank: int, output: Path, pair: Pair) -> None:
    """The newest checkpoint loses a byte of one shard between two parts of a run."""
    pair.stopped("fsdp-damaged", at=5, parallel="fsdp")
    if rank == 0:
        newest = max((output / "checkpoints").glob("step-*"))
        shard = next((newest / "optimizer").glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    dist.barrier()
    pair.run("fsdp-damaged", parallel="fsdp")
