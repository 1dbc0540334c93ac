"""The output folder of a run: its owner, its content, and whether it starts, resumes or refuses.

config.yaml           the resolved configuration
metrics.jsonl         one line per logged step          evaluations.jsonl    one line per evaluation
tensorboard/          the same for TensorBoard          tokens/              token caches
checkpoints/          see `checkpoint.py`               model/               the finished model, a plain headway folder
result.json           final figures; its presence means that the run is finished
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headway.errors import CheckpointError, TrainingError
from headway.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
    remove_unfinished,
)
from headway.training.config import TrainConfig

try:
    import fcntl
except ImportError:  # Windows: there a folder is not guarded against a second process
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, EVALUATIONS, TENSORBOARD = "config.yaml", "metrics.jsonl", "evaluations.jsonl", "tensorboard"
CHECKPOINTS, MODEL, RESULT, TOKENS, LOCK = "checkpoints", "model", "result.json", "tokens", ".lock"

_OF_ONE_RUN = (CONFIG, METRICS, EVALUATIONS, TENSORBOARD, CHECKPOINTS, MODEL, RESULT)


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
    foreign = sorted(entry.name for entry in folder.iterdir() if not _is_own(entry.name)) if folder.is_dir() else []
    if foreign and not (folder / CONFIG).exists() and not config.overwrite:
        raise TrainingError(
            f"the output folder {folder} holds something that is not a run of headway ({foreign[0]}); choose another "
            f"--output, or pass --overwrite to train in it (its other files are kept)"
        )
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
        yield folder


def begin(folder: Path, config: TrainConfig) -> RunStart:
    """Decide whether a claimed folder starts a run or continues one, and clear what stands in the way.

    Raises:
        TrainingError: a finished run or an unfinished one that the options do not allow to continue or to replace.
        CheckpointError: no checkpoint is whole, or the one asked for is not.
    """
    remove_unfinished(folder / CHECKPOINTS)
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
    later = [
        other
        for other in checkpoint_paths(folder / CHECKPOINTS)
        if not path.is_dir() or path.resolve().parent != (folder / CHECKPOINTS).resolve() or other.name > path.name
    ]
    checkpoint = read_checkpoint(path)
    if later:
        raise TrainingError(
            f"{folder} holds checkpoints that the run resumed from {path} would write again (such as {later[0].name}); "
            f"choose another --output"
        )
    return RunStart(checkpoint, (f"resuming from {path} ({checkpoint.state.step} steps done)",))


def _is_own(name: str) -> bool:
    return name in (*_OF_ONE_RUN, TOKENS, LOCK) or name.startswith(f".{MODEL}.saving-")


def _clear(folder: Path) -> None:
    try:
        # The model goes last and the configuration with it: until then the folder is recognisably a run.
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
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {error.strerror}; free space or choose another --output") from error
