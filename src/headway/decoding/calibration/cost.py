"""What a forward costs, measured on steps of the real loop that take turns: monotone tables.

Legend: B rows, T positions of a prompt, m drafted tokens of a forward, the root not counted.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headway.decoding.engine import ENGINE, decoding_context
from headway.errors import DecodingError

Draft = TypeVar("Draft", bound=Hashable)


@dataclass(frozen=True)
class StepSeconds:
    """Of one forward, its acceptance, its bookkeeping and the next draft.

    Attributes:
        median: over the steps.
        low: first quartile.
        high: third quartile.
        steps: how many were timed.
    """

    median: float
    low: float
    high: float
    steps: int

    def to_json(self) -> dict[str, Any]:
        """In milliseconds."""
        return {
            "ms": round(self.median * 1000, 4),
            "quartiles_ms": [round(self.low * 1000, 4), round(self.high * 1000, 4)],
            "steps": self.steps,
        }


def measure_steps(
    model: Any,
    prompts_BT: Tensor,
    drafts: Mapping[Draft, Mapping[str, Any]],
    *,
    executor: str,
    rounds: int,
    steps: int,
    sampling: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Draft, StepSeconds]:
    """Time steps after the prompts.

    Every draft decodes a few tokens in every round, in an order that rotates, so that a machine that is slower for a while is
    so for all. The prefill and the first step are not timed.

    Args:
        model: a `MultiTokenLM`.
        prompts_BT: their length is the context at which costs are measured.
        drafts: arguments of `generate` for each.
        executor: what runs the model.
        rounds: generations of each draft.
        steps: timed in each generation; fewer where the model ends its texts.
        sampling: arguments of `generate` that say how tokens are chosen; greedily by default.
        progress: is told the round.

    Raises:
        DecodingError: texts that end before a step could be timed.
    """
    device = model.get_input_embeddings().weight.device
    ids_BT = prompts_BT.to(device)
    seconds: dict[Draft, list[float]] = {draft: [] for draft in drafts}
    order = list(drafts)
    for number in range(rounds):
        progress(f"costs: round {number + 1} of {rounds}")
        turn = number * len(order) // max(1, rounds)
        for draft in order[turn:] + order[:turn]:
            arguments = dict(drafts[draft])
            # Room enough that no draft is cut by the limit within the timed steps.
            widest = model.num_future_tokens + int(arguments.get("num_lookup_tokens", 0))
            loop = ENGINE.start(
                model,
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=(steps + 3) * widest,
                executor=executor,
                **(sampling or {"do_sample": False}),
                **arguments,
            )
            with decoding_context(model):
                for _ in range(2):
                    if not loop.finished:
                        loop.step()
                for _ in range(steps):
                    if loop.finished:
                        break
                    start = time.perf_counter()
                    loop.step()
                    seconds[draft].append(time.perf_counter() - start)
    if not all(seconds.values()):
        raise DecodingError(
            "the model ends its texts at once after these prompts, so no step could be timed; pass a text that goes on"
        )
    return {draft: _summary(times) for draft, times in seconds.items()}


def _summary(times: list[float]) -> StepSeconds:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return StepSeconds(median, low, high, len(times))


@dataclass(frozen=True)
class CostTable:
    """Seconds of a forward by drafted tokens, between measured widths on straight lines.

    >>> CostTable((2, 4), (1.0, 2.0)).seconds(3), CostTable((2, 4), (1.0, 2.0)).seconds(1)
    (1.5, 1.0)

    Attributes:
        widths: m that were measured, rising.
        medians: seconds, never falling.
    """

    widths: tuple[int, ...]
    medians: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.medians) or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"a table of costs needs rising widths with a cost each: got {self.widths}")
        if list(self.medians) != sorted(self.medians):
            raise ValueError(f"costs must not fall with the width: got {self.medians}; see monotone_costs")

    def seconds(self, nodes: int) -> float:
        """Of a forward with so many drafted tokens; beyond the measured widths, of the nearest one."""
        place = bisect.bisect_left(self.widths, nodes)
        if place == 0 or place == len(self.widths):
            return self.medians[min(place, len(self.widths) - 1)]
        low, high = self.widths[place - 1], self.widths[place]
        share = (nodes - low) / (high - low)
        return self.medians[place - 1] * (1 - share) + self.medians[place] * share


def monotone(values: Sequence[float]) -> list[float]:
    """The never-falling sequence nearest to the values in squares: neighbours that fall are replaced by their mean.

    >>> monotone([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, many), (before, some) = pools.pop(), pools.pop()
            pools.append(((last * many + before * some) / (many + some), many + some))
    return [value for value, count in pools for _ in range(count)]


def monotone_costs(measured: Mapping[int, Mapping[int, float]]) -> dict[int, CostTable]:
    """Per limit of depth a table whose costs do not fall with the width.

    A deeper limit of the same width runs more heads, but its trees are other trees: nothing is assumed between tables.

    Args:
        measured: depth -> width -> seconds.
    """
    return {
        depth: CostTable(tuple(sorted(row)), tuple(monotone([row[width] for width in sorted(row)])))
        for depth, row in measured.items()
    }
