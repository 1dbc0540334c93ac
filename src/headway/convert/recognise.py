"""Which format a folder looks like, for messages."""

from __future__ import annotations

import json
from pathlib import Path

_SEQUENTIAL = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")


def looks_like(folder: Path) -> str | None:
    """The format that a folder seems to be in; None where it seems to be none.

    Args:
        folder: any folder.
    """
    if (folder / "mtp" / "config.json").is_file():
        return "headway"
    if (folder / "params.json").is_file():
        return "facebook"
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    if not isinstance(values, dict):
        return None
    if any((folder / name).is_file() for name in ("medusa_lm_head.pt", "medusa_lm_head.safetensors")):
        return "medusa"
    if values.get("model_type") == "medusa":
        return "medusa-engine"
    return "transformers-mtp" if any(values.get(name) for name in _SEQUENTIAL) else "hf"
