"""Figures of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from headway.training.data_mix import SourceShare


def describe_figures(values: Mapping[str, Any]) -> str:
    """Figures of an evaluation as one line.

    >>> describe_figures({"nats": [1.25, 2.0], "walk_acceptance_length": 1.75, "walk_acceptance_rate": []})
    'nats 1.250 2.000; walk_acceptance_length 1.750'
    """
    return "; ".join(f"{name} {_numbers(value)}" for name, value in values.items() if _is_figure(value))


def percent(share: float | None) -> str:
    """A share in percent, a dash where there is none.

    >>> percent(0.4567), percent(None)
    ('45.7 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, with days where there are any; a question mark where it is not known.

    >>> duration(3725.4), duration(None)
    ('1:02:05', '?')
    """
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def memory(resident_bytes: int | None, gpu_peak_bytes: int | None) -> str | None:
    """The GPU's peak where there is a GPU, else what the process has in RAM; None where neither is known.

    >>> memory(3 * 2**30, None), memory(3 * 2**30, 2**34)
    ('3.00 GiB', '16.00 GiB GPU peak')
    """
    if gpu_peak_bytes is not None:
        return f"{gpu_peak_bytes / 2**30:.2f} GiB GPU peak"
    return None if resident_bytes is None else f"{resident_bytes / 2**30:.2f} GiB"


def mix(shares: Iterable[SourceShare]) -> str:
    """Shares of the sources beside those asked for.

    >>> mix([SourceShare("code", asked=0.7, drawn=0.698), SourceShare("text", asked=0.3, drawn=0.302)])
    'code 69.8 % (asked 70.0 %), text 30.2 % (asked 30.0 %)'
    """
    return ", ".join(f"{share.source} {percent(share.drawn)} (asked {percent(share.asked)})" for share in shares)


def weights(values: Sequence[float]) -> str | None:
    """Offset weights, or None where all are 1, as in the paper.

    >>> weights([1.0, 0.5]), weights([1.0, 1.0])
    ('1 0.5', None)
    """
    return None if all(value == 1 for value in values) else " ".join(f"{value:.3g}" for value in values)


def _is_figure(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return len(items) > 0 and all(item is None or isinstance(item, int | float) for item in items)


def _numbers(value: Any) -> str:
    if isinstance(value, Sequence):
        return " ".join(_numbers(item) for item in value)
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
