"""From folders of runs to one page and one JSON document."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.errors import DataError
from headway.experiments.report.curves import TRAINING, figures
from headway.experiments.report.efficiency import SampleEfficiency, sample_efficiency
from headway.experiments.report.page import report_page
from headway.experiments.report.runs import RunRecords, number, read_runs
from headway.experiments.report.tables import option_differences, warnings
from headway.provenance import provenance


@dataclass(frozen=True, eq=False)
class RunReport:
    """Runs side by side.

    Attributes:
        runs: in the order given; differences are from the first.
        efficiency: at equal loss and at equal budgets; None where fewer than two runs have held-out losses.
    """

    runs: tuple[RunRecords, ...]
    efficiency: SampleEfficiency | None

    def to_json(self) -> dict[str, Any]:
        """Newest figures of every run, differences of options, sample efficiency, warnings."""
        return {
            "runs": [_run_json(run, self.runs) for run in self.runs],
            "option_differences": option_differences(self.runs),
            "sample_efficiency": None if self.efficiency is None else _efficiency_json(self.efficiency),
            "warnings": warnings(self.runs),
        }


def compare_runs(folders: Sequence[Path]) -> RunReport:
    """Read runs and compare them; unfinished ones are taken as far as they are.

    Raises:
        DataError: no folder, or one that holds no run.
    """
    runs = read_runs(folders)
    return RunReport(runs, sample_efficiency(runs))


def write_page(report: RunReport, path: Path, *, overwrite: bool) -> None:
    """Write the page whole or not at all.

    Raises:
        DataError: the file is there and is not to be overwritten, or the disk refuses.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, the page is a file; name one, such as {path / 'report.html'}")
    if path.exists() and not overwrite:
        raise DataError(f"{path} is there already; name another --output, or pass --overwrite to replace it")
    record = provenance()
    names = ", ".join(run.name for run in report.runs)
    page = report_page(
        report.runs,
        report.efficiency,
        title=f"headway report: {names}" if len(names) < 80 else f"headway report: {len(report.runs)} runs",
        date=str(record["date"]),
        command=shlex.join(map(str, record["argv"])),
    )
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):  # where there is no folder there is nothing to take back
            aside.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; name another --output") from error


def _run_json(run: RunRecords, runs: Sequence[RunRecords]) -> dict[str, Any]:
    newest = run.steps[-1] if run.steps else {}
    return {
        "name": run.name,
        "folder": run.folder,
        "finished": run.result is not None,
        "num_future_tokens": run.num_future_tokens,
        "step": newest.get("step"),
        "tokens": number(newest.get("tokens")),
        "flops": number(newest.get("flops")),
        "evaluations": len(run.evaluations),
        "newest": {figure.title: figure.last(run) for figure in figures(runs) if figure.section != TRAINING},
    }


def _efficiency_json(found: SampleEfficiency) -> dict[str, Any]:
    return {
        "loss": {"figure": found.figure.key, "unit": found.figure.unit, "level": found.level},
        "runs": [
            {
                "name": name,
                "best_loss": found.best[place],
                **{
                    f"{axis}_to_level": None
                    if (need := needs[place]) is None
                    else {"amount": need.amount, "at_most": need.at_most, "over_first_run": need.ratio}
                    for axis, needs in found.needs.items()
                },
                **{f"loss_at_common_{axis}": losses[place] for axis, losses in found.at_budget.items()},
            }
            for place, name in enumerate(found.runs)
        ],
        "common_budget": dict(found.budgets),
    }
