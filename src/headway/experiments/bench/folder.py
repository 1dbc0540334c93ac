"""The folder of a benchmark: its document, its page and its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.errors import ConfigError
from headway.experiments.bench.charts import batch_chart, standalone, waterfall
from headway.experiments.bench.page import bench_page
from headway.experiments.demo.folder import write_json, write_text

DOCUMENT = "bench.json"
PAGE = "bench.html"
WATERFALL = "waterfall.svg"
BATCHES = "speedup_over_batch.svg"
FILES = (DOCUMENT, PAGE, WATERFALL, BATCHES)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder before anything is measured.

    Args:
        folder: missing or empty, or with `overwrite` the folder of an earlier benchmark.
        overwrite: whether an earlier benchmark may go.

    Raises:
        ConfigError: it holds something else, or a benchmark that may not go.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give another --output")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    others = [name for name in names if name not in FILES]
    if others:
        raise ConfigError(
            f"{folder} holds files that no benchmark wrote ({', '.join(others[:3])}); give another --output"
        )
    if names and not overwrite:
        raise ConfigError(f"{folder} holds an earlier benchmark; pass --overwrite to replace it, or another --output")


def write_folder(document: Mapping[str, Any], folder: Path) -> Path:
    """Write everything and return the page's path.

    Args:
        document: of `run_bench`.
        folder: as `check_folder` allows it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in ((WATERFALL, waterfall(document)), (BATCHES, batch_chart(document))):
        if drawing:
            write_text(folder / name, standalone(drawing))
        else:
            (folder / name).unlink(missing_ok=True)
    write_text(folder / PAGE, bench_page(document))
    write_json(folder / DOCUMENT, dict(document))
    return folder / PAGE
