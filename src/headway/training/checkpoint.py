"""Resume checkpoints: written aside and moved, checked before anything is opened.

    checkpoints/step-00000500/
        manifest.json             size and sha256 of every other file; a folder without it is no checkpoint
        model/                    a plain headway model with its tokenizer, usable as it is
        optimizer.safetensors     moments by parameter name, or optimizer/ with shards of them (sharded_checkpoint.py)
        run.json                  step, data position, random states of every process, configuration, what the run is
                                  made of

The schedule is a pure function of the step and the data order one of the row, so two integers are their whole state.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from headway.errors import CheckpointError
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.best import BestStep, record_best
from headway.training.optimizers import TrainingOptimizer
from headway.training.parallel import Parallel
from headway.training.rng import capture_rng, restore_rng, separate_streams
from headway.training.sharded_checkpoint import SHARDS, WHOLE_FILE, read_moments, write_moments

FORMAT = "headway-training-checkpoint"
FORMAT_VERSION = 1

_MANIFEST, _MODEL, _RUN = "manifest.json", "model", "run.json"
_NAME = re.compile(r"step-(\d{8,})")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class RunState:
    """Where a run is, besides weights, moments and random states.

    Attributes:
        step: optimizer steps done, skipped ones included; also the position of the schedule.
        next_row: global index of the first packed row that no step has used: the whole state of the data.
        elapsed_seconds: of the run so far.
        skipped_steps: steps without an update because of a non-finite loss or gradient.
        skipped_in_a_row: those of them since the last update.
    """

    step: int = 0
    next_row: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all checked.

    Attributes:
        path: its folder.
        state: where the run was.
        config: the configuration that wrote it, as `TrainConfig.to_dict` gives it.
        identity: what the run is made of; see `headway.training.identity`.
        rng: of each process; see `headway.training.rng`.
        step: how its steps were cut; see `headway.training.step_shape`. None in checkpoints of one process from before
            there were several.
    """

    path: Path
    state: RunState
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    rng: Sequence[Mapping[str, Any]]
    step: Mapping[str, int] | None = None

    def restore(self, model: MultiTokenLM, optimizer: TrainingOptimizer, parallel: Parallel | None = None) -> None:
        """Put weights, moments and random states back, bit for bit; all processes call this.

        Where there are more processes than wrote the checkpoint, the further ones draw from streams of their own.

        Args:
            model: as it is trained.
            optimizer: of its parameters.
            parallel: how several processes train it; None: one does.

        Raises:
            CheckpointError: they do not fit the model.
        """
        parallel = parallel or Parallel(model)
        needed, dtype = parallel.needs_whole_state, next(model.parameters()).dtype

        def weights() -> dict[str, Any]:
            return dict(MultiTokenLM.from_pretrained(self.path / _MODEL, dtype=dtype).state_dict()) if needed else {}

        try:
            parallel.load_whole_state(parallel.processes.together(weights))
            parallel.processes.together(lambda: read_moments(self.path, optimizer, parallel))
        except (RuntimeError, SafetensorError, OSError) as error:
            detail = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} does not fit this run: {detail}; resume with the configuration that wrote it",
                path=self.path,
            ) from error
        rank = parallel.processes.rank
        if rank < len(self.rng):
            restore_rng(self.rng[rank])
        else:
            restore_rng(self.rng[0])
            separate_streams(int(self.config.get("seed", 0)) + self.state.step, rank)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the run's checkpoint folder."""
    return folder / f"step-{step:08d}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Complete-looking checkpoints below `folder`, oldest first; their content is not checked here."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found)]


def write_checkpoint(
    folder: Path,
    *,
    model: MultiTokenLM,
    tokenizer: Any,
    optimizer: TrainingOptimizer,
    state: RunState,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int,
    best: BestStep | None = None,
    parallel: Parallel | None = None,
    step: Mapping[str, int] | None = None,
) -> Path:
    """Write the checkpoint of `state.step` and remove all but the `keep` newest and the best; all processes call this.

    At any moment of a kill or a power cut the folder holds complete checkpoints and at most one hidden unfinished one.

    Args:
        folder: of all checkpoints of the run; on a disk that all processes see.
        model: as it is trained.
        tokenizer: goes beside it.
        optimizer: of its parameters.
        state: where the run is.
        config: the configuration, as `TrainConfig.to_dict` gives it.
        identity: what the run is made of.
        keep: newest checkpoints kept.
        best: the best step so far, kept too.
        parallel: how several processes train the model; None: one does.
        step: how its steps are cut.

    Raises:
        CheckpointError: the disk refuses; what was there before is untouched.
    """
    parallel = parallel or Parallel(model)
    processes = parallel.processes
    target = checkpoint_path(folder, state.step)
    aside = folder / f".writing-{target.name}"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()

    def complete(weights: Mapping[str, Any], rng: Sequence[Mapping[str, Any]]) -> None:
        model.save_pretrained(aside / _MODEL, state_dict=dict(weights))
        save_tokenizer(tokenizer, aside / _MODEL)
        run: dict[str, Any] = {"state": asdict(state), "config": config, "identity": identity, "rng": rng[0]}
        if processes.several:
            run["rng_of_others"] = rng[1:]
        if step is not None:
            run["step"] = step
        (aside / _RUN).write_text(json.dumps(run, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        _write_manifest(aside)
        if target.exists():
            # A damaged checkpoint of this very step, which the run resumed before: the new one replaces it.
            shutil.rmtree(target)
        aside.rename(target)
        _sync(folder)

    try:
        processes.on_main(begin)
        rng = processes.gathered(capture_rng())
        processes.together(lambda: write_moments(aside, optimizer, parallel))
        weights = parallel.whole_state()
        processes.on_main(lambda: complete(weights, rng))
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {reason(error)}; the former checkpoints are untouched: free space or "
            f"choose another output folder, then start the same command again",
            path=target,
        ) from error
    finally:
        if processes.is_main:
            shutil.rmtree(aside, ignore_errors=True)
    processes.on_main(lambda: retain(folder, keep=keep, best=best))
    return target


def retain(folder: Path, *, keep: int, best: BestStep | None = None) -> None:
    """Record which checkpoint is the best and remove all but that one and the `keep` newest.

    Raises:
        CheckpointError: the disk refuses; too many checkpoints are there then, never too few.
    """
    kept = None if best is None else checkpoint_path(folder, best.step)
    if kept is not None and not kept.is_dir():
        kept = None
    try:
        record_best(folder, best, kept)
    except OSError as error:
        raise CheckpointError(
            f"cannot record the best checkpoint in {folder}: {error}; the checkpoints are whole: free space, then start "
            f"the same command again",
            path=folder,
        ) from error
    for old in checkpoint_paths(folder)[:-keep]:
        if old != kept:
            _remove(old)


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, then read where the run was.

    Raises:
        CheckpointError: a missing, truncated, changed or unreadable file, or another format version.
    """
    _check_manifest(path)
    try:
        run = json.loads((path / _RUN).read_text(encoding="utf-8"))
        return Checkpoint(
            path=path,
            state=RunState(**run["state"]),
            config=run["config"],
            identity=run["identity"],
            rng=(run["rng"], *run.get("rng_of_others", ())),
            step=run.get("step"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _RUN} cannot be read: {error}; use another checkpoint", path=path) from error


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that is whole, and the errors of the newer ones that are not.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    errors: list[CheckpointError] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            return read_checkpoint(path), errors
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(
            f"none of the {len(errors)} checkpoints in {folder} is whole (newest: {errors[0]}); pass --overwrite to "
            f"start again",
            path=folder,
        )
    return None, []


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((".writing-", ".removing-")):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "torch": torch.__version__, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync_tree(folder)


def _check_manifest(path: Path) -> None:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {what}; use another checkpoint", path=path)

    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}; check the path", path=path)
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise KeyError("format")
        version, files = manifest["format_version"], dict(manifest["files"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(f"{_MANIFEST} is missing or unreadable ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this headway reads {FORMAT_VERSION}; use the headway that wrote it",
            path=path,
        )
    if _RUN not in expected or not (WHOLE_FILE in expected or f"{SHARDS}/.metadata" in expected):
        raise damaged(f"{_MANIFEST} lists no {_RUN} or no {WHOLE_FILE}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise damaged(f"{name} has {file.stat().st_size} bytes, {size} were written")
        if _sha256(file) != digest:
            raise damaged(f"{name} differs from what was written (sha256)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    # Renamed first: a folder half removed by a kill must not look like a checkpoint.
    doomed = path.with_name(f".removing-{path.name}")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot remove the old checkpoint {path}: {error}; remove it by hand", path=path
        ) from error


def reason(error: BaseException) -> str:
    """What the system said, without the advice of the layer that met it."""
    cause = error.__cause__ if isinstance(error, CheckpointError) and error.__cause__ is not None else error
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside its model.

    Raises:
        OSError: the disk refuses.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers reports what the system refused as a bare Exception
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def sync_tree(folder: Path) -> None:
    """Let every file and folder below `folder`, and itself, reach the disk."""
    entries = sorted(folder.rglob("*"))
    for path in (*filter(Path.is_file, entries), *filter(Path.is_dir, entries), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Reach the disk before a rename tells the world that the content is there."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
