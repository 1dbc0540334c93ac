"""What a step of the scheduler did, and how it is doing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headway.decoding.controller import ControlReport
from headway.decoding.requests import FinishReason

WINDOW_STEPS = 128
"""Steps over which speed and acceptance are averaged."""


@dataclass(frozen=True)
class Emitted:
    """What one step gave one request.

    Attributes:
        id: of the request.
        tokens: new ones; empty where it was cancelled or failed.
        finish_reason: why it has ended; None while it goes on.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class SchedulerStatistics:
    """How the scheduler is doing, after its last step.

    Attributes:
        steps: so far.
        live_rows: requests of which a forward has read the prompt.
        reading_rows: requests whose prompts are being read.
        waiting: requests in the queue.
        finished: requests that have ended, whatever the reason.
        emitted_tokens: so far.
        tokens_per_second: of the last `WINDOW_STEPS` steps, time between steps left out; NaN before the first.
        mean_acceptance_length: tokens per row and forward in these steps, prompts apart; NaN before the first.
        draft_length: drafted tokens of the block that the next forward verifies; 0 without rows.
        step_seconds: of the last step.
        cache_tokens_used: slots that hold a token.
        cache_tokens_allocated: rows x slots that there are.
        cache_tokens_limit: rows x slots that there may be; None for no limit.
        cache_bytes_allocated: keys and values.
    """

    steps: int = 0
    live_rows: int = 0
    reading_rows: int = 0
    waiting: int = 0
    finished: int = 0
    emitted_tokens: int = 0
    tokens_per_second: float = math.nan
    mean_acceptance_length: float = math.nan
    draft_length: int = 0
    step_seconds: float = 0.0
    cache_tokens_used: int = 0
    cache_tokens_allocated: int = 0
    cache_tokens_limit: int | None = None
    cache_bytes_allocated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; NaN becomes None."""
        fields = asdict(self)
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()
        }


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        emitted: per request that got something or ended.
        statistics: after it.
    """

    emitted: list[Emitted]
    statistics: SchedulerStatistics


@dataclass(frozen=True)
class SchedulerReport:
    """How a scheduler has been doing, and what it decided about drafts.

    Attributes:
        statistics: after the last step.
        control: with `num_draft_tokens="auto"`, per size of the batch what its controller decided and why, by the most rows of
            that size: 1, 2, 4 for three and four rows, 8, ... Costs and acceptance are learnt for each by itself. Sizes that have
            not decoded are left out; lengths are those of the last forwards only. Empty where drafts are not controlled.
    """

    statistics: SchedulerStatistics
    control: Mapping[int, ControlReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the statistics, and `control` as a list with `most_rows` in each item."""
        control = [{"most_rows": rows, **report.to_dict()} for rows, report in sorted(self.control.items())]
        return self.statistics.to_dict() | {"control": control}


class Window:
    """Sums over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int, int, int]] = deque(maxlen=WINDOW_STEPS)

    def add(self, seconds: float, tokens: int, *, rows: int, decoded: int) -> None:
        """One more step: its time, its new tokens, rows of its block, and the tokens that the block gave."""
        self._steps.append((seconds, tokens, rows, decoded))

    def averages(self) -> tuple[float, float]:
        """Tokens per second; tokens per row and forward."""
        seconds, tokens, rows, decoded = (sum(column) for column in zip(*self._steps, strict=True))
        return (tokens / seconds if seconds else math.nan, decoded / rows if rows else math.nan)
