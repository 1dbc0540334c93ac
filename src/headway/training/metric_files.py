"""Reading what a run has written about itself; needs no torch, so that a report is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file up to the first line that is not whole.

    Such a line can only be the work of a kill or a power cut after the last checkpoint, which flushes what precedes it.
    """
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            records.append(record)
    return records
