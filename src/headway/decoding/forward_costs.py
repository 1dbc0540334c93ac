"""What forwards cost on this machine, in plain forwards.

A forward is of one kind: the drafted tokens that it verifies and those that are drafted after it. (0, 0) is plain decoding,
(k, k) is in the midst of drafts of k tokens, (0, k) begins them, (k, 0) ends them. A change from one length to another is not
measured, it is thought to cost as much as the mean of both.

    log seconds = pace + log cost(kind) + noise                                                     cost(plain) = 1

The pace is what the machine and the context make of every forward; it moves quickly. A cost belongs to the kind; it is a mean
that moves slowly. One measurement moves both, by shares of what it differs from their sum, so a machine that becomes busier in
the midst of drafts changes the pace and hardly the cost, and plain forwards, whose cost is 1 by definition, set the pace right.
Of three measurements in a row the median counts, which a single hiccup does not move.

A wrong cost may not stay. Where drafts look too dear they are not made, so nothing would ever correct a time that was taken while
the machine did something else. Therefore a cost that has not been measured for long is forgotten, sooner where it rests on few
measurements, later every time; and a shorter draft never counts for dearer than a longer one that is known as well.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

MEASUREMENTS = 2
"""Forwards of one kind from which on its time counts: the first one of a process also warms up."""

CERTAIN = 4
"""Forwards of one kind from which on its time alone counts, and not what other kinds make likely."""

PACE_SHARE, FIRST_PACE_SHARE, FIRST_FORWARDS = 0.15, 0.4, 3
"""How much of a difference the pace takes; and so much in the first plain forwards of a run of them and in the first forwards of
a generation, before which the machine may have changed."""

TRUSTED = 12
"""Measurements of a kind up to which its cost is their mean, and from which on its differences move the pace as much as those of
plain forwards do."""

LATER_COST_SHARE = 0.02
"""How much of a difference the cost takes from then on."""

FRESH, FRESH_COST_SHARE = 8, 0.12
"""So many forwards after plain ones the pace is known, and what differs is the cost's."""

FRESH_PARTED = 24
"""The same for plain forwards of rows that have parted meanwhile."""

LARGEST_DIFFERENCE = math.log(2)
"""Beyond that a difference is not counted further."""

GUESSED_DRAFT_COST, GUESSED_ROW_COST, LARGEST_GUESS = 0.15, 0.03, 0.6
"""Plain forwards that one more drafted token is thought to cost where nothing has been measured: more where a batch has more
rows, up to a limit."""

REMEMBERED_FORWARDS, REMEMBERED_MEASUREMENTS, LONGER_MEMORIES = 64, 16, 4
"""Forwards without another measurement after which a cost is forgotten, for each of its measurements up to so many; and how often
that number is doubled, once each time it happened."""

LATER_SHARE = 0.7
"""How much of the cost of each measured drafted token one more is thought to cost: the first one costs most."""

Kind = tuple[int, int]
"""Drafted tokens that a forward verifies, drafted tokens after it."""

PLAIN: Kind = (0, 0)

CERTAINLY_MORE = 1.05
"""What costs less than so many plain forwards may as well be one: measurements are not better than that."""

PARTED: Kind = (0, -1)
"""Plain decoding of rows that stood together before there were drafts and now stand at different positions."""


@dataclass
class KindCost:
    """What is known of one kind of forward.

    Attributes:
        log_cost: natural logarithm of its cost in plain forwards.
        count: measurements.
        measured_at: forwards of any kind before the last measurement.
        forgotten: times that it was forgotten.
    """

    log_cost: float = 0.0
    count: int = 0
    measured_at: int = 0
    forgotten: int = 0


class ForwardCosts:
    """Costs per kind of forward of one model, batch size and executor; what was not measured is estimated from what was."""

    def __init__(self, *, batch: int = 1) -> None:
        """Nothing is known yet of a batch of so many rows."""
        self.kinds: dict[Kind, KindCost] = {}
        self._pace = math.nan
        self._recent: deque[float] = deque(maxlen=3)
        self._forwards = 0
        self._plain_settled, self._together_at = -FRESH, -FRESH_PARTED
        self._since_begin = self._since_change = 0
        self._steady_costs: list[tuple[int, float]] | None = None
        self._last: Kind | None = None
        self._guess = min(LARGEST_GUESS, GUESSED_DRAFT_COST + GUESSED_ROW_COST * (batch - 1))

    @property
    def plain_known(self) -> bool:
        """Whether plain forwards were measured, without which nothing can be compared with them."""
        return self._known(PLAIN)

    @property
    def plain_seconds(self) -> float:
        """Of a plain forward, now."""
        return math.exp(self._pace)

    @property
    def plain_age(self) -> int:
        """Forwards since a plain one was measured."""
        return self._forwards - max(self.kinds[kind].measured_at for kind in (PLAIN, PARTED) if kind in self.kinds)

    @property
    def parted(self) -> float:
        """Plain forwards that one of rows that have parted costs; 1 where that was not measured or is not certainly more."""
        known = self.kinds.get(PARTED)
        if known is None or known.count < TRUSTED or self._forgotten(PARTED):
            return 1.0
        cost = math.exp(known.log_cost)
        return cost if cost >= CERTAINLY_MORE else 1.0

    def add(self, kind: Kind, seconds: float) -> None:
        """A forward took so long."""
        self._forwards += 1
        self._steady_costs = None
        if 0 not in kind and kind[0] != kind[1]:
            self._last = None
            return
        known = self.kinds.get(kind)
        if known is None or self._forgotten(kind):
            again = 0 if known is None else min(known.forgotten + 1, LONGER_MEMORIES)
            known = self.kinds[kind] = KindCost(forgotten=again)
        if kind != self._last:
            self._since_change = 0
            self._recent.clear()
        self._since_begin += 1
        self._since_change += 1
        self._last = kind
        known.measured_at = self._forwards
        if kind == PARTED:
            self._learn_parted(known, math.log(seconds))
            return
        known.count += 1
        self._learn(kind, known, math.log(seconds))

    def _learn_parted(self, known: KindCost, log_seconds: float) -> None:
        """Soon after rows stood together the pace is known, and the difference is what parting costs; later it is the pace."""
        difference = log_seconds - self._pace - known.log_cost
        difference = max(-LARGEST_DIFFERENCE, min(LARGEST_DIFFERENCE, difference))
        if self._forwards - self._together_at <= FRESH_PARTED:
            known.count += 1
            known.log_cost += max(FRESH_COST_SHARE, 1 / (known.count + 1)) * difference
            return
        self._recent.append(difference)
        if len(self._recent) > 1:
            share = FIRST_PACE_SHARE if self._since_change <= FIRST_FORWARDS else PACE_SHARE
            self._pace += share * sorted(self._recent)[(len(self._recent) - 1) // 2]
            self._plain_settled = self._forwards

    def _learn(self, kind: Kind, known: KindCost, log_seconds: float) -> None:
        if math.isnan(self._pace):
            self._pace = log_seconds
        difference = log_seconds - self._pace - known.log_cost
        if known.count <= MEASUREMENTS:
            # First calls cost what belongs to no kind.
            least = difference if known.count == 1 else min(0.0, difference)
            if kind == PLAIN:
                self._pace += least
            else:
                known.log_cost += least
            return
        difference = max(-LARGEST_DIFFERENCE, min(LARGEST_DIFFERENCE, difference))
        fresh = kind != PLAIN and self._forwards - self._plain_settled <= FRESH
        if kind != PLAIN:
            least = FRESH_COST_SHARE if fresh else LATER_COST_SHARE
            known.log_cost += max(least, 1 / known.count if known.count <= TRUSTED else 0.0) * difference
        elif self._since_change > 1:
            self._plain_settled = self._together_at = self._forwards
        self._recent.append(difference)
        if len(self._recent) > 1 and not fresh:
            # Of two the smaller one, since hiccups only make forwards longer.
            median = sorted(self._recent)[(len(self._recent) - 1) // 2]
            beginning = self._since_begin <= FIRST_FORWARDS or (kind == PLAIN and self._since_change <= FIRST_FORWARDS)
            trust = 1.0 if kind == PLAIN else min(1.0, known.count / TRUSTED)
            self._pace += trust * (FIRST_PACE_SHARE if beginning else PACE_SHARE) * median

    def begin_generation(self) -> None:
        """The machine may be faster or slower than it was, for all kinds."""
        self._since_begin, self._last = 0, None

    def relative(self, verified: int, prepared: int) -> float:
        """Plain forwards that a forward costs."""
        if (verified, prepared) == PARTED:
            return self.parted
        if verified == prepared:
            return self._steady(verified)
        if verified and prepared:
            return (self._steady(verified) + self._steady(prepared)) / 2
        # Heads alone, without the positions that a draft adds; or the positions without the heads.
        likely = 1 + (self._steady(prepared) - 1) / 2 if prepared else self._steady(verified)
        if not self._known((verified, prepared)):
            return likely
        kind = self.kinds[verified, prepared]
        share = min(1.0, kind.count / CERTAIN)
        return share * max(1.0, math.exp(kind.log_cost)) + (1 - share) * likely

    @property
    def longest_known(self) -> int:
        """The longest drafts whose cost was measured."""
        return max((kind[0] for kind in self.kinds if kind[0] == kind[1] and self._known(kind)), default=0)

    def diagonal(self) -> dict[int, float]:
        """Draft length -> seconds of a forward in the midst of such drafts, at the present pace, where measured."""
        return {
            verified: math.exp(self._pace + known.log_cost)
            for (verified, prepared), known in sorted(self.kinds.items())
            if verified == prepared
        }

    def _known(self, kind: Kind) -> bool:
        return kind in self.kinds and self.kinds[kind].count >= MEASUREMENTS and not self._forgotten(kind)

    def _forgotten(self, kind: Kind) -> bool:
        if kind == PLAIN:
            return False
        known = self.kinds[kind]
        memory = REMEMBERED_FORWARDS * min(known.count, REMEMBERED_MEASUREMENTS) * (1 << known.forgotten)
        return self._forwards - known.measured_at > memory

    def _steady(self, length: int) -> float:
        """In the midst of drafts of this length: measured, between two that were, or beyond the longest that was."""
        if length == 0:
            return 1.0
        below, above = (0, 1.0), None
        for own, cost in self._corrected():
            if own == length:
                return cost
            if own > length:
                above = own, cost
                break
            below = own, cost
        if above is not None:
            share = (length - below[0]) / (above[0] - below[0])
            return (1 - share) * below[1] + share * above[1]
        if below[0] == 0:
            return 1 + self._guess * length
        return below[1] + LATER_SHARE * (below[1] - 1) / below[0] * (length - below[0])

    def _corrected(self) -> list[tuple[int, float]]:
        """Known lengths and their costs, none below plain decoding, none above that of a longer one that is as well known."""
        if self._steady_costs is not None:
            return self._steady_costs
        lengths = [kind[0] for kind in self.kinds if kind[0] == kind[1] and kind[0] and self._known(kind)]
        costs: list[tuple[int, float]] = []
        least, best_known = math.inf, 0
        for length in sorted(lengths, reverse=True):
            known = self.kinds[length, length]
            cost = max(1.0, math.exp(known.log_cost))
            if known.count <= best_known:
                cost = min(cost, least)
            least, best_known = min(least, cost), max(best_known, min(known.count, CERTAIN))
            costs.append((length, cost))
        self._steady_costs = costs[::-1]
        return self._steady_costs
