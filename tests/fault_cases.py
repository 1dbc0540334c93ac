"""Runs on a disk that fills up or turns read-only, and in memory that runs out; one JSON line per case.

Started by `tests/training/test_faults.py` as root of a mount namespace of its own, which `unshare` makes:

    unshare --map-root-user --mount python tests/fault_cases.py FOLDER

Every case trains until the fault, tells the error, mends the fault, and starts the same command again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from headway.training.checkpoint import checkpoint_paths, read_checkpoint
from headway.training.config import TrainConfig
from headway.training.events import CheckpointWritten, EvaluationDone, Event, Notice, RunStarted
from headway.training.loop import train
from small_runs import run_fields, write_corpus

MEBI = 2**20


def evaluator(model: Any, step: int) -> dict[str, Any]:
    return {"nats": [10.0 - step]}


class Disk:
    """A file system of 8 MiB in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        self.bound: list[str] = []
        folder.mkdir()
        _system("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))

    def fill(self, leave: int = 0) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        if leave:
            os.truncate(self.filler, self.filler.stat().st_size - leave)

    def turn_read_only(self, folder: Path | None = None) -> None:
        """All of it, or a folder of it while files elsewhere on it are open."""
        where = str(folder or self.folder)
        _system("mount", "--bind", where, where)
        _system("mount", "-o", "remount,ro,bind", where)
        self.bound.append(where)

    def mend(self) -> None:
        for where in self.bound:
            _system("umount", where)
        self.bound.clear()
        self.filler.unlink(missing_ok=True)


def at(kind: type[Any], step: int | None, action: Callable[[], None]) -> Callable[[Event], None]:
    """A listener that does something once."""
    done: list[int] = []

    def listener(event: Event) -> None:
        if isinstance(event, kind) and (step is None or event.step == step) and not done:
            done.append(1)
            action()

    return listener


def disk_cases(corpus: Path, folder: Path) -> None:
    cases: dict[str, tuple[Any, int | None, Callable[[Disk], None]]] = {
        "full when the text is encoded": (Notice, None, Disk.fill),
        "full when the metrics are written": (RunStarted, None, Disk.fill),
        "full when a checkpoint is begun": (EvaluationDone, 2, Disk.fill),
        "full in the middle of a checkpoint": (CheckpointWritten, 2, lambda disk: disk.fill(leave=400_000)),
        "full when the model is written": (CheckpointWritten, 6, Disk.fill),
        "full in the middle of the model": (CheckpointWritten, 6, lambda disk: disk.fill(leave=200_000)),
        "read-only when a checkpoint is written": (
            EvaluationDone,
            4,
            lambda disk: disk.turn_read_only(disk.folder / "run" / "checkpoints"),
        ),
    }
    for number, (name, (kind, step, fault)) in enumerate(cases.items()):
        disk = Disk(folder / f"disk{number}")
        config = TrainConfig(**run_fields(corpus, disk.folder / "run", eval_every_steps=2))
        tell(name, config, at(kind, step, lambda disk=disk, fault=fault: fault(disk)), disk.mend)
    disk = Disk(folder / "read-only")
    disk.turn_read_only()
    tell("read-only from the start", TrainConfig(**run_fields(corpus, disk.folder / "run")), None, disk.mend)


def memory_case(corpus: Path, folder: Path) -> None:
    """Address space that ends a little above what is in use when the first step begins."""
    config = TrainConfig(**run_fields(corpus, folder / "memory", batch_size=128))

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + 12 * MEBI, resource.RLIM_INFINITY))

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    tell("out of memory", config, at(RunStarted, None, lower), lift)


def tell(name: str, config: TrainConfig, listener: Callable[[Event], None] | None, mend: Callable[[], None]) -> None:
    """Print what the fault came to, and what the same command did afterwards."""
    output = Path(config.output)
    outcome: dict[str, Any] = {"case": name, "error": None, "message": None}
    try:
        train(config, evaluators=[evaluator], on_event=listener)
    except BaseException as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
    mend()
    outcome["whole_checkpoints"] = [read_checkpoint(p).state.step for p in checkpoint_paths(output / "checkpoints")]
    outcome["half_written"] = sorted(path.name for path in output.rglob(".writing-*"))
    outcome["steps_after_mending"] = train(config, evaluators=[evaluator]).steps
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()


def two_at_once(corpus: Path, folder: Path) -> None:
    """Two processes that start the same run at the same moment."""
    config = TrainConfig(**run_fields(corpus, folder / "twice", steps=60, checkpoint_every_steps=None))
    go_read, go_write = os.pipe()
    results = []
    for _ in range(2):
        read, write = os.pipe()
        if os.fork() == 0:
            os.read(go_read, 1)
            try:
                message = f"trained {train(config).steps}"
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
            os.write(write, message.encode())
            os._exit(0)
        os.close(write)
        results.append(read)
    os.write(go_write, b"xx")
    messages = [os.read(read, 100_000).decode() for read in results]
    for _ in range(2):
        os.wait()
    sys.stdout.write(json.dumps({"case": "two processes at once", "messages": messages}) + "\n")
    sys.stdout.flush()


def _virtual_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))


def _system(*words: str) -> None:
    subprocess.run(words, check=True)


def main() -> None:
    """All cases."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    corpus = write_corpus(folder / "corpus")
    two_at_once(corpus, folder)
    disk_cases(corpus, folder)
    memory_case(corpus, folder)


if __name__ == "__main__":
    main()
