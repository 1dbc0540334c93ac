"""`mtp/calibration.json`: what was measured of a checkpoint, an entry for each machine and way.

An entry counts only where everything in its key is as it was when it was made, and only for the heads that it was made of.
The file is written aside and moved; nothing else of the checkpoint changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from headway.errors import CheckpointError
from headway.model.checkpoint import read_record
from headway.model.folder import HEADS_FOLDER
from headway.provenance import cpu_model, usable_cores

CALIBRATION_FILE = f"{HEADS_FOLDER}/calibration.json"
FORMAT = "headway-calibration"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MachineKey:
    """What decides the cost of a forward, apart from the model.

    Attributes:
        processor: trade name; of the accelerator where the model is on one.
        cores: that the process may use.
        threads: of one operation.
        dtype: of the weights.
        executor: that really runs the model.
        batch: rows decoded together.
    """

    processor: str
    cores: int
    threads: int
    dtype: str
    executor: str
    batch: int

    @classmethod
    def here(cls, model: Any, *, executor: str, batch: int) -> MachineKey:
        """Of this process."""
        weight = model.family.lm_head.weight
        on_cuda = weight.device.type == "cuda"
        processor = torch.cuda.get_device_name(weight.device) if on_cuda else cpu_model()
        return cls(
            processor=processor or "unknown",
            cores=usable_cores(),
            threads=torch.get_num_threads(),
            dtype=str(weight.dtype).removeprefix("torch."),
            executor=executor,
            batch=batch,
        )

    def in_words(self) -> str:
        """For a person."""
        counts = [f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((self.cores, "core"), (self.threads, "thread"))]
        return ", ".join((self.processor, *counts, self.dtype, self.executor, f"batch {self.batch}"))

    def differences(self, other: MachineKey) -> list[str]:
        """Names and values in which two keys differ, for a notice."""
        return [
            f"{field.name} {getattr(other, field.name)} instead of {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class Calibration:
    """One entry.

    Attributes:
        key: where it holds.
        heads: fingerprint of the heads and their base (`heads_fingerprint`).
        tree: the fastest draft, as paths of ranks; empty where plain decoding is fastest.
        tree_beside_lookup: the fastest tree beside a copied branch; None where that was not measured.
        draft_vocabulary: ids of the tokens that the heads score; None for all.
        report: everything that was measured and expected, for people and programs that read the file.
    """

    key: MachineKey
    heads: str
    tree: tuple[tuple[int, ...], ...]
    tree_beside_lookup: tuple[tuple[int, ...], ...] | None
    draft_vocabulary: tuple[int, ...] | None
    report: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "machine": asdict(self.key),
            "heads": self.heads,
            "tree": [list(path) for path in self.tree],
            "tree_beside_lookup": None
            if self.tree_beside_lookup is None
            else [list(path) for path in self.tree_beside_lookup],
            "draft_vocabulary": None if self.draft_vocabulary is None else list(self.draft_vocabulary),
            "report": dict(self.report),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Calibration:
        """The same back."""
        beside, part = entry["tree_beside_lookup"], entry["draft_vocabulary"]
        return cls(
            key=MachineKey(**entry["machine"]),
            heads=str(entry["heads"]),
            tree=_paths(entry["tree"]),
            tree_beside_lookup=None if beside is None else _paths(beside),
            draft_vocabulary=None if part is None else tuple(int(token) for token in part),
            report=dict(entry["report"]),
        )


def _paths(paths: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(rank) for rank in path) for path in paths)


def heads_fingerprint(folder: Path) -> str:
    """sha256 of what `mtp/config.json` records of heads and base: their weights' checksums and their architecture.

    Raises:
        CheckpointError: the folder has no heads, or their record is damaged.
    """
    record = read_record(folder)
    known = [record["heads_sha256"], record["base"]["fingerprint"], record["multi_token"]]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def read_calibrations(folder: Path) -> list[Calibration]:
    """All entries of a checkpoint; empty where nothing was calibrated.

    Raises:
        CheckpointError: a damaged file, or one of another version.
    """
    path = folder / CALIBRATION_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise KeyError("format")
        version = document["format_version"]
        entries = [Calibration.from_json(entry) for entry in document["entries"]] if version == FORMAT_VERSION else []
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run headway calibrate again", path=path
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this headway reads {FORMAT_VERSION}; delete it and run headway "
            f"calibrate again",
            path=path,
        )
    return entries


def store_calibration(folder: Path, calibration: Calibration) -> Path:
    """Put an entry into the checkpoint's file, in the place of one with the same key.

    Entries of other heads go: nobody can use them any more.

    Raises:
        CheckpointError: the folder cannot be written, or holds a damaged file.
    """
    path = folder / CALIBRATION_FILE
    kept = [
        entry
        for entry in read_calibrations(folder)
        if entry.key != calibration.key and entry.heads == calibration.heads
    ]
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "entries": [entry.to_json() for entry in (*kept, calibration)],
    }
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".calibration-", suffix=".json", delete=False
        ) as aside:
            try:
                json.dump(document, aside, allow_nan=False)
                aside.write("\n")
                aside.flush()
                os.fsync(aside.fileno())
                Path(aside.name).chmod(path.stat().st_mode if path.exists() else 0o644)
                Path(aside.name).replace(path)
            except BaseException:
                Path(aside.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; choose a copy of the model that you may write", path=path
        ) from error
    return path
