"""The output folder of a run: its owner, its content, and whether it starts, resumes or refuses.

config.yaml           the resolved configuration
metrics.jsonl         one line per logged step          evaluations.jsonl    one line per evaluation
tensorboard/          the same for TensorBoard          tokens/              token caches
tracking.json         ids of the run at W&B or trackio
checkpoints/          see `checkpoint.py`, `best.py`  model/              the finished model, a plain headway folder
result.json           final figures; its presence means that the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headway.errors import CheckpointError, TrainingError
from headway.provenance import provenance
from headway.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
    remove_unfinished,
)
from headway.training.config import TrainConfig
from headway.training.final_model import remove_unfinished_model
from headway.training.run_files import CHECKPOINTS as CHECKPOINTS
from headway.training.run_files import CONFIG as CONFIG
from headway.training.run_files import EVALUATIONS as EVALUATIONS
from headway.training.run_files import LOCK as LOCK
from headway.training.run_files import MARKER as MARKER
from headway.training.run_files import METRICS as METRICS
from headway.training.run_files import MODEL as MODEL
from headway.training.run_files import RESULT as RESULT
from headway.training.run_files import TENSORBOARD as TENSORBOARD
from headway.training.run_files import TOKENS as TOKENS
from headway.training.run_files import TRACKING as TRACKING

try:
    import fcntl
except ImportError:  # Windows: there a folder is not guarded against a second process
    fcntl = None  # type: ignore[assignment]

_FORMAT = "headway-run"
# In the order in which they are cleared: a folder half cleared still looks like a run, and not like a finished one.
_OF_ONE_RUN = (RESULT, MODEL, CHECKPOINTS, METRICS, EVALUATIONS, TENSORBOARD, TRACKING, CONFIG)


@dataclass(frozen=True)
class RunStart:
    """How a run begins.

    Attributes:
        checkpoint: what it continues; None starts from scratch.
        notices: sentences for a person: what was found and what was decided.
    """

    checkpoint: Checkpoint | None
    notices: tuple[str, ...]


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path]:
    """Own the output folder inside the block: create it and keep other processes out.

    Raises:
        TrainingError: it is a file, not writable, holds something that is not a run, or another process trains in it.
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"the output {folder} is a file, a folder is needed; choose another --output")
    is_run = _is_run(folder)
    if folder.is_dir() and not is_run:
        _check_foreign(folder, overwrite=config.overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"cannot write to the output folder {folder}: {error.strerror}; choose another --output"
        ) from error
    with lock:
        if fcntl is not None:
            try:
                # Released by the system when the process ends, however it ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(
                    f"another process is training in {folder}; wait for it, stop it, or choose another --output"
                ) from error
        if not is_run:
            write_text(folder / MARKER, json.dumps({"format": _FORMAT, "provenance": provenance()}, indent=2) + "\n")
        yield folder


def begin(folder: Path, config: TrainConfig) -> RunStart:
    """Decide whether a claimed folder starts a run or continues one, and clear what stands in the way.

    Raises:
        TrainingError: a finished run or an unfinished one that the options do not allow to continue or to replace.
        CheckpointError: no checkpoint is whole, or the one asked for is not.
    """
    remove_unfinished(folder / CHECKPOINTS)
    remove_unfinished_model(folder)
    if config.overwrite:
        _clear(folder)
        return RunStart(None, ())
    if (folder / RESULT).exists():
        raise TrainingError(
            f"{folder} holds a finished run; choose another --output, or pass --overwrite to replace it"
        )
    if config.resume not in ("auto", "never"):
        return _from_named_checkpoint(folder, Path(config.resume))
    if config.resume == "never" and checkpoint_paths(folder / CHECKPOINTS):
        raise TrainingError(
            f"{folder} holds an unfinished run and resume=never; pass --resume auto to continue it or --overwrite to "
            f"replace it"
        )
    checkpoint, errors = newest_checkpoint(folder / CHECKPOINTS)
    notices = [f"warning: {error}" for error in errors]
    if checkpoint is not None:
        notices.append(f"resuming from {checkpoint.path} ({checkpoint.state.step} steps done)")
    elif (folder / METRICS).exists():
        notices.append(f"the run in {folder} left no checkpoint; starting it again")
        _clear(folder)
    return RunStart(checkpoint, tuple(notices))


def _from_named_checkpoint(folder: Path, path: Path) -> RunStart:
    path = path.resolve() if path.is_symlink() else path  # checkpoints/best
    checkpoint = read_checkpoint(path)
    own = path.resolve().parent == (folder / CHECKPOINTS).resolve()
    later = [other for other in checkpoint_paths(folder / CHECKPOINTS) if not own or other.name > path.name]
    if later:
        raise TrainingError(
            f"{folder} holds checkpoints that the run resumed from {path} would write again (such as {later[0].name}); "
            f"choose another --output"
        )
    if not own:
        _clear(folder)
    return RunStart(checkpoint, (f"resuming from {path} ({checkpoint.state.step} steps done)",))


def _is_run(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text(encoding="utf-8"))["format"] == _FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_foreign(folder: Path, *, overwrite: bool) -> None:
    """Refuse to train among files of somebody else, and even when asked to, to put ours in the place of theirs."""
    there = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, f".{MARKER}.writing"))
    if there and not overwrite:
        raise TrainingError(
            f"the output folder {folder} holds something that is not a run of headway ({there[0]}); choose another "
            f"--output, or pass --overwrite to train in it (its other files are kept)"
        )
    taken = [name for name in there if name in (*_OF_ONE_RUN, TOKENS)]
    if taken:
        raise TrainingError(
            f"the output folder {folder} is not a run of headway, but holds {taken[0]}, which a run would replace; "
            f"choose another --output"
        )


def _clear(folder: Path) -> None:
    try:
        for name in _OF_ONE_RUN:
            entry = folder / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot clear {folder}: {error}; choose another --output", path=folder) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file aside and move it, so that a reader sees all of it or the former one.

    Raises:
        TrainingError: the disk refuses.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {error.strerror}; free space or choose another --output") from error
