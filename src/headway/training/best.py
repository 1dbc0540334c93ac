"""The best checkpoint of a run: which figure decides, which step has it, and how a reader finds it.

    checkpoints/best.json     step, figure and value
    checkpoints/best          a link to that checkpoint: `headway generate RUN/checkpoints/best/model`

Which step is best is a pure function of the evaluations done so far, so a resumed run keeps the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.errors import ConfigError

BEST_RECORD, BEST_LINK = "best.json", "best"

_LOWER_IS_BETTER = ("nats", "bits", "loss", "perplexity", "error")
_FROM_OFFSET_2 = "acceptance_rate"


@dataclass(frozen=True)
class Figure:
    """A figure of the evaluations that ranks checkpoints.

    Attributes:
        name: as it stands in evaluations.jsonl.
        offset: which of a figure that has one number per offset, from 1.
    """

    name: str
    offset: int = 1

    @property
    def lower_is_better(self) -> bool:
        """True for nats, bits, losses, perplexities and errors; rates and lengths are the better the higher."""
        return any(word in self.name.lower() for word in _LOWER_IS_BETTER)

    def value(self, figures: Mapping[str, Any]) -> float | None:
        """The number in the figures of one evaluation; None where it is absent or not finite."""
        found = figures.get(self.name)
        if isinstance(found, list | tuple):
            place = self.offset - first_offset(self.name)
            found = found[place] if 0 <= place < len(found) else None
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return None
        return float(found)


@dataclass(frozen=True)
class BestStep:
    """The step whose evaluation is the best so far.

    Attributes:
        step: optimizer steps done.
        value: of the figure.
        figure: its name.
        offset: which of a figure with one number per offset.
        lower_is_better: how values compare.
    """

    step: int
    value: float
    figure: str
    offset: int
    lower_is_better: bool


def first_offset(name: str) -> int:
    """The offset of the first number of a figure that has one per offset: drafts, and their acceptance, begin at 2.

    >>> first_offset("nats"), first_offset("walk_acceptance_rate")
    (1, 2)
    """
    return 2 if name.endswith(_FROM_OFFSET_2) else 1


def parse_figure(text: str) -> Figure:
    """Read `NAME` or `NAME:OFFSET`; without an offset, the first that the figure has.

    >>> parse_figure("accuracy:2"), parse_figure("walk_acceptance_rate")
    (Figure(name='accuracy', offset=2), Figure(name='walk_acceptance_rate', offset=2))
    >>> parse_figure("nats").lower_is_better, parse_figure("walk_acceptance_length").lower_is_better
    (True, False)

    Raises:
        ConfigError: no name, or an offset that the figure does not have.
    """
    name, colon, offset = text.partition(":")
    first = first_offset(name)
    if not name or (colon and not (offset.isdecimal() and int(offset) >= first)):
        raise ConfigError(
            f"keep_best takes a figure of evaluations.jsonl, with an offset from {first} where it has one per offset "
            f"(nats, accuracy:2): got {text!r}; correct it or set keep_best to none"
        )
    return Figure(name, int(offset) if colon else first)


def better(best: BestStep | None, figure: Figure, *, step: int, figures: Mapping[str, Any]) -> BestStep | None:
    """The best of `best` and a new evaluation; of equal ones the earlier."""
    value = figure.value(figures)
    if value is None:
        return best
    if best is not None and (value >= best.value if figure.lower_is_better else value <= best.value):
        return best
    return BestStep(step, value, figure.name, figure.offset, figure.lower_is_better)


def best_of(evaluations: Iterable[Mapping[str, Any]], figure: Figure) -> BestStep | None:
    """The best of the lines of evaluations.jsonl; None where none has the figure."""
    best: BestStep | None = None
    for line in evaluations:
        best = better(best, figure, step=int(line["step"]), figures=line)
    return best


def record_best(folder: Path, best: BestStep | None, checkpoint: Path | None) -> None:
    """Let the record and the link of a checkpoint folder name the best checkpoint, or remove them.

    Each is written aside and moved. Where the file system knows no links there is only the record.

    Args:
        folder: of the checkpoints.
        best: the best step.
        checkpoint: its checkpoint below `folder`; None where there is none.

    Raises:
        OSError: the disk refuses.
    """
    record, link = folder / BEST_RECORD, folder / BEST_LINK
    if best is None or checkpoint is None:
        record.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
        return
    text = json.dumps({"checkpoint": checkpoint.name} | asdict(best), indent=2) + "\n"
    if record.exists() and record.read_text(encoding="utf-8") == text and link.exists():
        return
    aside = folder / f".writing-{BEST_RECORD}"
    aside.write_text(text, encoding="utf-8")
    aside.replace(record)
    aside = folder / f".writing-{BEST_LINK}"
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(checkpoint.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        return
    aside.replace(link)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint folder; None where no checkpoint is recorded as best."""
    try:
        found = json.loads((folder / BEST_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
