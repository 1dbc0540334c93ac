"""headway.json beside weights in a layout that has no field for what headway knows of them.

Which base the heads belong to (fingerprint and name), n and loss weights, and for layouts that rename a family its own
configuration. Other readers of the layout do not look at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.convert.lazy_model import LazyModel
from headway.errors import CheckpointError, HeadwayError
from headway.model.config import MultiTokenConfig
from headway.model.fingerprint import FingerprintBuilder, same_fingerprint
from headway.provenance import provenance

SIDECAR_FILE = "headway.json"


@dataclass(frozen=True)
class Sidecar:
    """What headway.json says.

    Attributes:
        path: of the file.
        mtp_config: n, kind of heads, loss weights.
        base_name: by which people know the base.
        fingerprint: of the base's weights; None where the layout holds them itself.
        config: configuration of the base as its own family writes it; None where the layout has it.
    """

    path: Path
    mtp_config: MultiTokenConfig
    base_name: str | None
    fingerprint: Mapping[str, str] | None
    config: Mapping[str, Any] | None


def read_sidecar(folder: Path) -> Sidecar | None:
    """What headway.json in a folder says; None where there is none.

    Raises:
        CheckpointError: a damaged file.
    """
    path = folder / SIDECAR_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Sidecar(
            path=path,
            mtp_config=MultiTokenConfig.from_dict(record["multi_token"]),
            base_name=record["base_name"],
            fingerprint=record["base_fingerprint"],
            config=record["base_config"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, HeadwayError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore or delete it", path=path
        ) from error


def write_sidecar(model: LazyModel, folder: Path, *, config: Mapping[str, Any] | None = None) -> None:
    """Write headway.json; the base's fingerprint where the base stays apart, read one tensor at a time."""
    fingerprint = None
    if model.apart:
        fingerprint = base_fingerprint_of(model)
    record = {
        "base_name": model.base_name,
        "multi_token": model.mtp_config.to_dict(),
        "base_fingerprint": fingerprint,
        "base_config": None if config is None else dict(config),
        "provenance": {key: value for key, value in provenance().items() if key != "argv"},
    }
    (folder / SIDECAR_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_fingerprint_of(model: LazyModel) -> dict[str, str]:
    """The fingerprint of a model's base, one tensor in memory at a time."""
    builder = FingerprintBuilder()
    base = model.whole_base
    for name in sorted(base):
        builder.add(name, base[name].read())
    return builder.fingerprint()


def check_fingerprint(record: Sidecar, plain: LazyModel, folder: Path) -> None:
    """Hold heads to the base that they were written for.

    Raises:
        CheckpointError: another base.
    """
    if record.fingerprint is not None and not same_fingerprint(record.fingerprint, base_fingerprint_of(plain)):
        raise CheckpointError(
            f"the heads in {folder} belong to another base ({record.base_name}): the weights of this one differ from its "
            f"fingerprint; pass the base that they were trained with",
            path=folder,
        )
