"""`tree="calibrated"`: the tree and draft vocabulary that `headway calibrate` stored for a machine."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.decoding.calibration.stored import (
    CALIBRATION_FILE,
    Calibration,
    MachineKey,
    heads_fingerprint,
    read_calibrations,
)
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.model import LeanModel
from headway.errors import DecodingError
from headway.model.checkpoint import CONFIG_FILE, loaded_from

if TYPE_CHECKING:
    from headway.decoding.options import DecodingOptions

CALIBRATED = "calibrated"

logger = logging.getLogger(__name__)
_said: set[str] = set()


def with_calibration(options: DecodingOptions, model: Any, *, batch: int) -> tuple[DecodingOptions, str | None]:
    """Options with the stored tree in the place of `tree="calibrated"`; others come back as they are.

    Where the checkpoint was calibrated, but not for this machine, way to run and batch, or for other heads, the calibration is
    ignored: the model drafts a chain, as without a tree.

    Args:
        options: as asked for.
        model: a `MultiTokenLM`.
        batch: rows decoded together.

    Returns:
        The options, and a notice for the result and the log (`announce`) where the calibration was ignored or chose plain
        decoding.

    Raises:
        DecodingError: the model does not come from a folder, or its folder holds no calibration.
        CheckpointError: the file is damaged.
    """
    if options.tree != CALIBRATED or options.num_draft_tokens == 0:
        return options, None
    folder = loaded_from(model)
    if folder is None:
        raise DecodingError(
            "tree='calibrated' reads mtp/calibration.json of the model's folder, and this model was not loaded from one; save "
            "it, run `headway calibrate FOLDER TEXT`, and load it with MultiTokenLM.from_pretrained"
        )
    entries, heads = _stored(folder)
    if not entries:
        raise DecodingError(
            f"tree='calibrated' needs a calibration, and {folder} has none; run `headway calibrate {folder} TEXT` with a "
            f"text like those you will decode"
        )
    falls_back = options.executor == "lean" and not isinstance(lean_model(model), LeanModel)
    executor = "eager" if falls_back else options.executor
    here = MachineKey.here(model, executor=executor, batch=batch)
    entry, reason = _choose(entries, here, heads)
    if entry is None:
        notice = (
            f"the calibration in {folder.name}/mtp is ignored ({reason}): drafts are chains; run headway calibrate here"
        )
        return replace(options, tree=None), notice
    return _apply(options, entry)


def announce(notice: str) -> None:
    """Log a notice of `with_calibration`; the same one only once in a process."""
    if notice not in _said:
        _said.add(notice)
        logger.warning(notice)


def _stored(folder: Path) -> tuple[tuple[Calibration, ...], str]:
    """Entries of a folder and the fingerprint of its heads, read again only where one of the files has changed."""
    files = [folder / CALIBRATION_FILE, folder / CONFIG_FILE]
    stats = [file.stat() if file.exists() else None for file in files]
    return _read(
        folder, tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
    )


@functools.lru_cache(maxsize=8)
def _read(folder: Path, state: tuple[tuple[int, int, int] | None, ...]) -> tuple[tuple[Calibration, ...], str]:
    return tuple(read_calibrations(folder)), heads_fingerprint(folder)


def _choose(entries: tuple[Calibration, ...], here: MachineKey, heads: str) -> tuple[Calibration | None, str]:
    own = [entry for entry in entries if entry.heads == heads]
    if not own:
        return None, "it was measured with other heads"
    for entry in own:
        if entry.key == here:
            return entry, ""
    nearest = min((entry.key.differences(here) for entry in own), key=len)
    return None, f"it was measured elsewhere; here: {', '.join(nearest)}"


def _apply(options: DecodingOptions, entry: Calibration) -> tuple[DecodingOptions, str | None]:
    part = options.draft_vocabulary if options.draft_vocabulary is not None else entry.draft_vocabulary
    if options.drafts == "heads+lookup":
        if entry.tree_beside_lookup is None:
            notice = (
                "the calibration has no tree to go beside copies; run headway calibrate with --lookup: chains are used"
            )
            return replace(options, tree=None, draft_vocabulary=part), notice
        return replace(options, tree=entry.tree_beside_lookup, draft_vocabulary=part), None
    if not entry.tree:
        notice = "the calibration found plain decoding fastest on this machine: nothing is drafted"
        return replace(options, tree=None, num_draft_tokens=0), notice
    return replace(options, tree=entry.tree, draft_vocabulary=part), None
