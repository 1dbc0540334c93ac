"""How long the next draft should be, from measured costs and acceptance.

    speed(k) = (1 + a_1 + a_1 a_2 + ... + a_1 .. a_k) / seconds(k)         tokens of a row per second with drafts of k tokens

seconds(k) is what a forward costs that verifies k drafted tokens and drafts k new ones, on this machine, for this batch;
a_j is how often the draft of offset j + 1 was right lately where those before it were. The length with the highest speed
wins; another takes over only where it is clearly better.

Without drafts nothing is learnt about drafts, so at times one is tried (a probe). A probe starts from optimism and drafts
until what it sees says no, which costs about the same whatever the machine; how long to wait until the next follows from
what the last one cost, such that all probes together take `PROBE_SHARE` of the time.

Exactness. The length of the draft that follows a forward is decided before that forward runs, from tokens that earlier
forwards verified and from times that have passed. It is therefore a function of the past: given the past, every draft is
verified by a rule that is exact for its length, and exactness of each block given the past is exactness of the text. What
is forbidden is to look at drawn tokens and then to decide how many of them count.

No tensors here, and the clock is the caller's, so decisions can be tested with simulated machines and texts.

Source: the idea of a draft length from costs and acceptance is Leviathan et al. 2023 (arXiv:2211.17192), section 3.5; that
lengths must not anticipate drafts, Cheng et al. 2026 (DSpark, arXiv:2607.05147), appendix A.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MEMORY = 0.93
"""Weight of a forward's evidence one forward later: half of it is gone after ten forwards, 10 to 40 tokens."""

UNSEEN_MEMORY = 0.98
"""The same for offsets beyond the present draft, of which nothing new is seen: they become plausible again."""

OPTIMISM = 0.8
"""What the first drafted token is worth as long as nothing has been seen, with the weight of one observation."""

CLEARLY_BETTER = 1.03
"""How many times as fast another length has to look; none at all is taken as soon as it looks best."""

PROBE_SHARE = 0.015
"""Share of the time of plain decoding that probes may lose."""

SHORTEST_WAIT, LONGEST_WAIT = 16, 512
"""Forwards without drafts between two probes."""

CHECK_EVERY, CHECKS = 64, 3
"""Forwards with drafts after which a small advantage over plain decoding is checked, and by how many plain forwards."""

SMALL_ADVANTAGE = 1.15
"""An advantage from here on is not checked."""

SETTLED = 6
"""Forwards of one kind in a row after which a further change of their time is thought to be the machine's, not a correction."""

MEASUREMENTS = 2
"""Forwards of one kind in a row that make a first measurement."""


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
            self.seconds = min(self._recent) if self.count == 2 else statistics.median(self._recent)
        else:
            self._recent.append(min(seconds, 2 * before))
            self.seconds += max(0.15, 1 / (self.run + 1)) * (statistics.median(self._recent) - before)
        return self.seconds / before


@dataclass(frozen=True)
class RowStep:
    """What one forward did for one row.

    Attributes:
        drafted: drafts that were compared with the model's own tokens.
        accepted: how many of them, from the front, were right.
        tokens: emitted.
    """

    drafted: int
    accepted: int
    tokens: int


@dataclass(frozen=True)
class ControlReport:
    """What a controller decided and why.

    Attributes:
        lengths: the draft length chosen at each forward, the prefill first.
        switches: how often it changed.
        probes: drafts that were tried after a time without.
        seconds_per_forward: draft length -> measured seconds of a forward.
        acceptance: per drafted offset its running conditional acceptance, the last estimate.
    """

    lengths: tuple[int, ...]
    switches: int
    probes: int
    seconds_per_forward: dict[int, float]
    acceptance: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "lengths": list(self.lengths),
            "switches": self.switches,
            "probes": self.probes,
            "seconds_per_forward": {str(length): seconds for length, seconds in self.seconds_per_forward.items()},
            "acceptance": list(self.acceptance),
        }


class DraftController:
    """Chooses one draft length after the other for a whole batch.

    Attributes:
        longest: K.
        length: chosen last.
        lengths: all that were chosen.
        probes: how many drafts were tried after a time without.
    """

    def __init__(
        self,
        longest: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        times: MutableMapping[int, StepTime] | None = None,
    ) -> None:
        """Start with the longest draft.

        Args:
            longest: K, 0 for none ever.
            clock: seconds.
            times: draft length -> what is known of its cost; updated in place, so that a later controller of the same
                model and batch can begin with it.
        """
        self.longest = longest
        self.length = longest
        self.lengths: list[int] = []
        self.probes = 0
        self._clock = clock
        self._times: MutableMapping[int, StepTime] = {} if times is None else times
        self._tried = [0.0] * longest
        self._right = [0.0] * longest
        self._began = 0.0
        self._measured = -1
        self._resting = False
        self._idle = 0  # forwards without drafts while resting
        self._wait = SHORTEST_WAIT
        self._lost = 0.0  # seconds since drafting began again, beyond what plain decoding would have taken
        self._since_check = 0
        self._checking = 0
        self._checked_length = 0

    # -------------------------------------------------------------------------------------------------- the caller's side

    def begin(self) -> int:
        """A forward begins; returns the length of the draft that will follow it."""
        self._began = self._clock()
        self.length = self._decide() if self.lengths else self.longest
        self.lengths.append(self.length)
        return self.length

    def end(self, rows: Sequence[RowStep], *, verified: int, prepared: int, measured: bool = True) -> None:
        """The forward and the draft after it are done.

        Args:
            rows: of the batch that had not ended before.
            verified: drafted tokens that the forward verified, 0 for none.
            prepared: drafted tokens that the next one will.
            measured: False for a prefill, whose time and tokens tell nothing.
        """
        # A coarse clock may stand still, and speeds divide by seconds.
        seconds = max(self._clock() - self._began, 1e-9)
        if not measured or not rows:
            return
        if verified == prepared:
            self._measure(verified, seconds)
        if verified:
            self._learn(rows, verified)
        plain = self._times.get(0)
        if plain is not None and (verified or prepared):
            tokens = sum(row.tokens for row in rows) / len(rows)
            self._lost += seconds - tokens * plain.seconds
        if verified or prepared:
            self._idle = 0
            self._since_check += 1
        else:
            self._idle += 1

    def report(self) -> ControlReport:
        """What happened so far."""
        return ControlReport(
            lengths=tuple(self.lengths),
            switches=sum(before != after for before, after in itertools.pairwise(self.lengths)),
            probes=self.probes,
            seconds_per_forward={length: self._times[length].seconds for length in sorted(self._times)},
            acceptance=tuple(self.acceptance()),
        )

    # ------------------------------------------------------------------------------------------------------- what it knows

    def acceptance(self) -> list[float]:
        """Per drafted offset its running conditional acceptance; what was not seen is thought to be as good as the one before."""
        rates, above = [], OPTIMISM
        for tried, right in zip(self._tried, self._right, strict=True):
            above = (right + above) / (tried + 1)
            rates.append(above)
        return rates

    def seconds(self, length: int) -> float:
        """Of a forward; interpolated where it was not measured."""
        if length in self._times:
            return self._times[length].seconds
        below = max(known for known in self._times if known < length)
        above = min(known for known in self._times if known > length)
        share = (length - below) / (above - below)
        return (1 - share) * self._times[below].seconds + share * self._times[above].seconds

    def speeds(self) -> list[float]:
        """Expected tokens per row and second of every length from 0 on."""
        tokens, survival, speeds = 1.0, 1.0, [1 / self.seconds(0)]
        for length, rate in enumerate(self.acceptance(), start=1):
            survival *= rate
            tokens += survival
            speeds.append(tokens / self.seconds(length))
        return speeds

    def _measure(self, length: int, seconds: float) -> None:
        if length not in self._times:
            self._times[length] = StepTime(seconds)
        else:
            step_time = self._times[length]
            if length != self._measured:
                step_time.begin_run()
            moved = step_time.add(seconds)
            if step_time.run > SETTLED:
                # A longer context or a busier machine is slower for every length.
                for other, others_time in self._times.items():
                    if other != length:
                        others_time.seconds *= moved
        self._measured = length

    def _learn(self, rows: Sequence[RowStep], verified: int) -> None:
        for index in range(self.longest):
            memory = MEMORY if index < verified else UNSEEN_MEMORY
            self._tried[index] = memory * self._tried[index] + sum(row.drafted > index for row in rows)
            self._right[index] = memory * self._right[index] + sum(row.accepted > index for row in rows)

    # ------------------------------------------------------------------------------------------------------- what it decides

    def _decide(self) -> int:
        if self.longest == 0:
            return 0
        for length in (self.longest, 0):
            if length not in self._times or self._times[length].count < MEASUREMENTS:
                return length
        if self._checking:
            self._checking -= 1
            return 0 if self._checking else self._checked_length
        if self._resting:
            return self._perhaps_probe()
        speeds = self.speeds()
        best = max(range(self.longest + 1), key=speeds.__getitem__)
        if best == 0:
            self._stop()
            return 0
        if speeds[best] > CLEARLY_BETTER * speeds[self.length]:
            return best
        if self._since_check >= CHECK_EVERY and speeds[self.length] < SMALL_ADVANTAGE * speeds[0]:
            # The first of them still verifies a draft, the others are measured.
            self._since_check, self._checking, self._checked_length = 0, CHECKS + 1, self.length
            return 0
        return self.length

    def _stop(self) -> None:
        """Drafting does not pay: rest, the longer the more it has cost."""
        allowed = PROBE_SHARE * self._times[0].seconds
        self._wait = int(min(max(self._lost / allowed, SHORTEST_WAIT), LONGEST_WAIT))
        self._resting, self._idle = True, 0

    def _perhaps_probe(self) -> int:
        if self._idle < self._wait:
            return 0
        self._tried, self._right = [0.0] * self.longest, [0.0] * self.longest
        speeds = self.speeds()
        best = max(range(self.longest + 1), key=speeds.__getitem__)
        if best == 0:
            # Not even an optimist would draft at these costs.
            self._idle, self._wait = 0, LONGEST_WAIT
            return 0
        self._resting, self._lost, self._since_check = False, 0.0, 0
        self.probes += 1
        return best
