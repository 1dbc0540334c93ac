"""What forwards cost on this machine, in plain forwards.

A forward is of one kind: the drafted tokens that it verifies and those that are drafted after it. (0, 0) is plain decoding,
(k, k) is in the midst of drafts of k tokens, (0, k) begins them, (k, 0) ends them. A change from one length to another is not
measured, it is thought to cost as much as the mean of both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SETTLED = 6
"""Forwards of one kind in a row after which a further change of their time is thought to be the machine's, not a correction."""

MEASUREMENTS = 2
"""Forwards of one kind from which on its time counts: the first one of a process also warms up."""

CERTAIN = 4
"""Forwards of one kind from which on its time alone counts, and not what other kinds make likely."""

GUESSED_DRAFT_COST, GUESSED_ROW_COST, LARGEST_GUESS = 0.15, 0.03, 0.6
"""Plain forwards that one more drafted token is thought to cost where nothing has been measured: more where a batch has more
rows, up to a limit."""

FIRST_FORWARDS = 3
"""Forwards at the beginning of a generation that say how fast the machine is now, compared with the last one."""

LATER_SHARE = 0.7
"""How much of the cost of each measured drafted token one more is thought to cost: the first one costs most."""

Kind = tuple[int, int]
"""Drafted tokens that a forward verifies, drafted tokens after it."""

PLAIN: Kind = (0, 0)


@dataclass
class StepTime:
    """Seconds of one kind of forward, followed over time.

    An exponentially weighted mean of medians of three, which a single hiccup of the machine hardly moves. It learns quickly
    at the beginning of a run of such forwards, whose times may have changed since the last run, and slowly within one.

    Attributes:
        seconds: the estimate.
        count: measurements.
        run: measurements since the last forward of another kind.
    """

    seconds: float
    count: int = 1
    run: int = 1
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def __post_init__(self) -> None:
        self._recent.append(self.seconds)

    def begin_run(self) -> None:
        """Forwards of another kind lay between the last measurement and the next."""
        self.run = 0
        self._recent.clear()
        self._recent.append(self.seconds)

    def add(self, seconds: float) -> float:
        """Take one more measurement; returns how many times as large the estimate has become."""
        before = self.seconds
        self.count += 1
        self.run += 1
        if self.count <= 3:
            self._recent.append(seconds)
            # What first calls cost belongs to no length.
            self.seconds = min(self._recent) if self.count == 2 else self._median()
        else:
            self._recent.append(min(seconds, 2 * before))
            self.seconds += max(0.15, 1 / (self.run + 1)) * (self._median() - before)
        return self.seconds / before

    def _median(self) -> float:
        ordered = sorted(self._recent)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class ForwardCosts:
    """Times per kind of forward of one model, batch size and executor; what was not measured is estimated from what was."""

    def __init__(self, *, batch: int = 1) -> None:
        """Nothing is known yet of a batch of so many rows."""
        self.times: dict[Kind, StepTime] = {}
        self._last: Kind | None = None
        self._guess = min(LARGEST_GUESS, GUESSED_DRAFT_COST + GUESSED_ROW_COST * (batch - 1))
        self._first_ratios = [1.0] * FIRST_FORWARDS

    @property
    def plain_known(self) -> bool:
        """Whether plain forwards were measured, without which nothing can be compared with them."""
        return self._known(PLAIN)

    @property
    def plain_seconds(self) -> float:
        """Of a plain forward."""
        return self.times[PLAIN].seconds

    def add(self, kind: Kind, seconds: float) -> None:
        """A forward took so long."""
        if 0 not in kind and kind[0] != kind[1]:
            self._last = None
            return
        if kind not in self.times:
            self.times[kind] = StepTime(seconds)
        else:
            step_time = self.times[kind]
            if len(self._first_ratios) < FIRST_FORWARDS and step_time.count >= CERTAIN:
                self._compare_machine(seconds / step_time.seconds)
                self._last = kind
                return
            if kind != self._last:
                step_time.begin_run()
            moved = step_time.add(seconds)
            if step_time.run > SETTLED:
                # A longer context or a busier machine is slower for every kind.
                for other, others_time in self.times.items():
                    if other != kind:
                        others_time.seconds *= moved
        self._last = kind

    def begin_generation(self) -> None:
        """The machine may be faster or slower than it was, for all kinds."""
        self._first_ratios, self._last = [], None

    def _compare_machine(self, ratio: float) -> None:
        self._first_ratios.append(ratio)
        if len(self._first_ratios) == FIRST_FORWARDS:
            # The median, which one hiccup does not move.
            change = sorted(self._first_ratios)[FIRST_FORWARDS // 2]
            for step_time in self.times.values():
                step_time.seconds *= change

    def relative(self, verified: int, prepared: int) -> float:
        """Plain forwards that a forward costs."""
        if verified == prepared:
            return self._steady(verified)
        if verified and prepared:
            return (self._steady(verified) + self._steady(prepared)) / 2
        # Heads alone, without the positions that a draft adds; or the positions without the heads.
        likely = 1 + (self._steady(prepared) - 1) / 2 if prepared else self._steady(verified)
        time = self.times.get((verified, prepared))
        if time is None or time.count < MEASUREMENTS:
            return likely
        share = min(1.0, time.count / CERTAIN)
        return share * time.seconds / self.plain_seconds + (1 - share) * likely

    @property
    def longest_known(self) -> int:
        """The longest drafts whose cost was measured."""
        return max(
            (kind[0] for kind, time in self.times.items() if kind[0] == kind[1] and time.count >= MEASUREMENTS),
            default=0,
        )

    def diagonal(self) -> dict[int, float]:
        """Draft length -> seconds of a forward in the midst of such drafts, where measured."""
        return {
            verified: time.seconds for (verified, prepared), time in sorted(self.times.items()) if verified == prepared
        }

    def copy_ratios(self, other: ForwardCosts) -> None:
        """Begin with what is known of a similar batch."""
        self.times |= {
            kind: StepTime(time.seconds, count=MEASUREMENTS) for kind, time in other.times.items() if other._known(kind)
        }

    def _known(self, kind: Kind) -> bool:
        return kind in self.times and self.times[kind].count >= MEASUREMENTS

    def _steady(self, length: int) -> float:
        """In the midst of drafts of this length: measured, between two that were, or beyond the longest that was."""
        if length == 0:
            return 1.0
        plain = self.plain_seconds
        if self._known((length, length)):
            return self.times[length, length].seconds / plain
        below, above = (0, 1.0), None
        for kind, time in self.times.items():
            own = kind[0]
            if own == kind[1] and own and time.count >= MEASUREMENTS:
                if below[0] < own < length:
                    below = own, time.seconds / plain
                elif own > length and (above is None or own < above[0]):
                    above = own, time.seconds / plain
        if above is not None:
            share = (length - below[0]) / (above[0] - below[0])
            return (1 - share) * below[1] + share * above[1]
        if below[0] == 0:
            return 1 + self._guess * length
        return below[1] + LATER_SHARE * (below[1] - 1) / below[0] * (length - below[0])
