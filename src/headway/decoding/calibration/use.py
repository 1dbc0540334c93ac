"""`tree="calibrated"`: the tree and the draft vocabulary that `headway calibrate` stored for this machine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.decoding.calibration.stored import Calibration, MachineKey, heads_fingerprint, read_calibrations
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.model import LeanModel
from headway.errors import DecodingError
from headway.model.checkpoint import loaded_from

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
        The options, and a notice for the result where the calibration was ignored or chose plain decoding; the log has
        the same notice once.

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
    entries = read_calibrations(folder)
    if not entries:
        raise DecodingError(
            f"tree='calibrated' needs a calibration, and {folder} has none; run `headway calibrate {folder} TEXT` with a "
            f"text like those you will decode"
        )
    executor = "lean" if options.executor == "lean" and isinstance(lean_model(model), LeanModel) else "eager"
    here = MachineKey.here(model, executor=executor, batch=batch)
    entry, reason = _choose(entries, here, folder)
    if entry is None:
        notice = (
            f"the calibration in {folder.name}/mtp is ignored ({reason}): drafts are chains; run headway calibrate here"
        )
        _say_once(notice)
        return replace(options, tree=None), notice
    return _apply(options, entry)


def _choose(entries: list[Calibration], here: MachineKey, folder: Path) -> tuple[Calibration | None, str]:
    heads = heads_fingerprint(folder)
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
            _say_once(notice)
            return replace(options, tree=None, draft_vocabulary=part), notice
        return replace(options, tree=entry.tree_beside_lookup, draft_vocabulary=part), None
    if not entry.tree:
        notice = "the calibration found plain decoding fastest on this machine: nothing is drafted"
        return replace(options, tree=None, num_draft_tokens=0), notice
    return replace(options, tree=entry.tree, draft_vocabulary=part), None


def _say_once(notice: str) -> None:
    if notice not in _said:
        _said.add(notice)
        logger.warning(notice)
