"""How long the next draft should be, within a budget for what drafting may lose.

    speed(k) = (1 + a_1 + a_1 a_2 + ... + a_1 .. a_k) / cost(k)         times as fast as plain decoding, with drafts of k tokens

cost(k) is what a forward costs that verifies k drafted tokens and drafts k new ones, in plain forwards, on this machine and
for this batch (`headway.decoding.forward_costs`); a_j is how often the draft of offset j + 1 was right lately where those
before it were. The length with the highest speed wins; another takes over only where it is clearly better.

Never slower than off. An account is kept in plain forwards: what the forwards with drafts gave, in tokens per row (of the
row that is behind, which decides when a batch is done), less what they cost.

    balance = tokens - sum of cost(forward)              allowance = ALLOWED_AT_ONCE + ALLOWED_SHARE * tokens

Before a draft is ordered, its worst case is assumed: the draft that is on its way and this one are both wrong from their
first token on. Where the balance would then fall below minus the allowance, the order is not given. So the balance never
does, and a text of T tokens takes at most T + allowance plain forwards, up to the error of the measured costs. What drafting
has gained may be lost again; what it has not gained may be lost up to the allowance alone.

Without drafts nothing is learnt about drafts. So at times one is made and compared with the text that follows, instead of
being verified (`headway.decoding.trial`): this costs the heads but not the wider forward, and it is paid from the same
account. Trials that fail are made less and less often.

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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headway.decoding.forward_costs import PARTED, PLAIN, ForwardCosts, Kind

EVIDENCE, LEAST_MEMORY = 12, 0.6
"""Observations that the running acceptance rests on: of one row half is gone after eight forwards, of many rows sooner."""

FAILURES, FAILING_MEMORY = 3, 0.4
"""Forwards in a row whose drafts were all wrong, and the weight that older evidence has after them."""

UNSEEN_MEMORY = 0.98
"""The same for offsets beyond the present draft, of which nothing new is seen: they become plausible again."""

LONG_MEMORY = 0.99
"""The same for what later generations begin with."""

OPTIMISM = 0.8
"""What the first drafted token is worth as long as nothing has been seen, with the weight of one observation."""

DOUBT = 0.3
"""The same while a trial is going on."""

MOST_EXPERIENCE = 3.0
"""Observations that the experience of earlier generations counts for at the beginning of one."""

CLEARLY_BETTER = 1.03
"""How many times as fast as the present length another one has to look."""

WORTH_STARTING, WORTH_KEEPING = 1.05, 1.02
"""How many times as fast as plain decoding drafts have to look; costs are known to some percent only."""

ALLOWED_AT_ONCE = 0.5
"""Plain forwards that drafting may lose in any generation."""

ALLOWED_SHARE = 0.015
"""Share of plain decoding that drafting may lose beyond that."""

TRIAL_COST = 0.15
"""Plain forwards that a trial may cost, its length is chosen to fit."""

TRIAL_SHARE = 0.0125
"""Share of plain decoding that failing trials may cost: a dear one is followed by a long wait."""

SHORTEST_WAIT, LONGEST_WAIT = 4, 32
"""Plain forwards between two trials; every one that fails doubles the wait."""

CHECK_EVERY, CHECKS = 64, 3
"""Forwards with drafts after which a small advantage over plain decoding is checked, and by how many plain forwards."""

FIRST_CHECK = 12
"""The same in a generation that began with drafts."""

SMALL_ADVANTAGE, CHECK_LARGE_EVERY = 1.25, 256
"""An advantage from here on is checked after so many forwards only, over generations: it is large only if plain decoding is as
slow as it seemed."""


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one forward did for one row.

    Attributes:
        accepted: drafts that were right, from the front.
        tokens: emitted.
    """

    accepted: int
    tokens: int


@dataclass(frozen=True)
class ControlReport:
    """What a controller decided and why.

    Attributes:
        lengths: the draft length chosen at each forward, the prefill first; 0 where the draft was a trial.
        switches: how often it changed.
        trials: drafts that were compared with the text instead of being verified.
        balance: plain forwards that drafting has saved, by the measured costs; negative where it has lost some.
        seconds_per_forward: draft length -> measured seconds of a forward.
        acceptance: per drafted offset its running conditional acceptance, the last estimate.
    """

    lengths: tuple[int, ...]
    switches: int
    trials: int
    balance: float
    seconds_per_forward: dict[int, float]
    acceptance: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "lengths": list(self.lengths),
            "switches": self.switches,
            "trials": self.trials,
            "balance": self.balance,
            "seconds_per_forward": {str(length): seconds for length, seconds in self.seconds_per_forward.items()},
            "acceptance": list(self.acceptance),
        }


@dataclass
class Experience:
    """What generations of one model, batch size and executor leave to later ones.

    Attributes:
        costs: of forwards.
        tried: per offset how often a draft was compared whose earlier offsets were right, half forgotten after 70 forwards.
        right: how often it was right.
    """

    costs: ForwardCosts = field(default_factory=ForwardCosts)
    tried: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)


class DraftController:
    """Chooses one draft length after the other for a whole batch.

    Attributes:
        longest: K.
        length: chosen last.
        trial: tokens to draft now for a trial, 0 for none.
        lengths: all that were chosen.
        trials: how many trials were made.
    """

    def __init__(
        self,
        longest: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        experience: Experience | None = None,
        trials: bool = True,
    ) -> None:
        """Start with what is known.

        Args:
            longest: K, 0 for none ever.
            clock: seconds.
            experience: of earlier generations; updated in place.
            trials: whether comparing a draft with the text says how often it would be accepted. Not so for drawn drafts,
                which are tried by being verified.
        """
        self.longest = longest
        self.length = 0
        self.trial = 0
        self.lengths: list[int] = []
        self.trials = 0
        self._clock = clock
        self._experience = Experience() if experience is None else experience
        self._experience.tried += [0.0] * (longest - len(self._experience.tried))
        self._experience.right += [0.0] * (longest - len(self._experience.right))
        self._costs = self._experience.costs
        self._costs.begin_generation()
        self._can_try = trials
        self._began = 0.0
        # Evidence, to begin with of earlier generations.
        self._prior = OPTIMISM
        self._tried = [min(MOST_EXPERIENCE, tried) for tried in self._experience.tried[:longest]]
        self._right = [
            right * weight / tried if tried else 0.0
            for right, tried, weight in zip(self._experience.right, self._experience.tried, self._tried, strict=False)
        ]
        self._failures = 0
        # The account.
        self._kinds: Counter[Kind] = Counter()
        self._drafted_tokens = 0.0
        self._plain_forwards = 0
        self._lag = 0.0
        self._parted, self._remaining = False, 0
        # What it is doing.
        self._verifying = 0
        self._resting = True
        self._trying = False
        self._trial_cost = 0.0
        self._heard = False
        self._idle = 0
        self._wait = 0
        self._next_wait = SHORTEST_WAIT
        self._before = 0.0
        self._since_check = CHECK_EVERY - FIRST_CHECK
        self._checking = 0
        self._checked_length = 0

    # -------------------------------------------------------------------------------------------------- the caller's side

    def begin(self, remaining: int = 0) -> int:
        """A forward begins; returns the length of the draft that will follow it and be verified.

        Where that is 0 and `trial` is not, a draft of `trial` tokens is to be made and compared with the text.

        Args:
            remaining: tokens that a row can still get, for all of which rows that part now will stay so.
        """
        self._remaining = remaining
        self._began = self._clock()
        self.trial = 0
        # Most forwards of a rest need no thought.
        self.length = 0 if self._resting and self._idle < self._wait else self._decide()
        self.lengths.append(self.length)
        return self.length

    def end(
        self,
        rows: Sequence[RowStep],
        *,
        verified: int,
        prepared: int,
        measured: bool = True,
        lag: float | None = None,
        parted: bool = False,
    ) -> None:
        """The forward and the draft after it are done.

        Args:
            rows: of the batch that had not ended before; not read where nothing was verified or prepared.
            verified: drafted tokens that the forward verified, 0 for none.
            prepared: drafted tokens that were made after it, to be verified or for a trial.
            measured: False for a prefill, whose time and tokens tell nothing, and at the end of a text.
            lag: tokens by which the row that is furthest behind is behind the mean of the rows; None where that is as before.
            parted: whether rows that began at one position stand at different ones from now on.
        """
        was_parted, self._parted = self._parted, parted
        self._verifying = 0 if self.trial else prepared
        if verified:
            self._learn(rows, verified)
        if self.trial and not prepared:
            self.no_trial()
        if not measured:
            return
        # A coarse clock may stand still, and costs divide by seconds.
        kind = PARTED if was_parted and not verified and not prepared else (verified, prepared)
        self._costs.add(kind, max(self._clock() - self._began, 1e-9))
        self._idle += 1
        if kind == PLAIN:
            self._plain_forwards += 1
            return
        self._kinds[kind] += 1
        if kind == PARTED:
            self._drafted_tokens += 1
            return
        self._drafted_tokens += sum(row.tokens for row in rows) / max(1, len(rows))
        self._lag = self._lag if lag is None else lag
        self._since_check += 1

    def compared(self, depth: int, tried: int, right: int, *, over: bool) -> None:
        """One more token of a trial.

        Args:
            depth: of the token, from 1.
            tried: rows whose draft was right before it.
            right: those of them where it still is.
            over: whether nothing is left to compare.
        """
        self._note(depth - 1, tried, right)
        if self._resting:
            # Think about it now.
            self._wait, self._heard, self._trying = 0, True, not over

    def no_trial(self) -> None:
        """There was nothing to draft, or the rows of the batch have changed: what was begun is not compared."""
        self._trying, self._idle, self._wait = False, 0, SHORTEST_WAIT

    def report(self) -> ControlReport:
        """What happened so far."""
        return ControlReport(
            lengths=tuple(self.lengths),
            switches=sum(before != after for before, after in itertools.pairwise(self.lengths)),
            trials=self.trials,
            balance=self.balance() if self._costs.plain_known else 0.0,
            seconds_per_forward=self._costs.diagonal(),
            acceptance=tuple(self.acceptance()),
        )

    # ------------------------------------------------------------------------------------------------------- what it knows

    def acceptance(self) -> list[float]:
        """Per drafted offset its running conditional acceptance; what was not seen is thought to be as good as the one before."""
        rates, above = [], self._prior
        for tried, right in zip(self._tried, self._right, strict=True):
            above = (right + above) / (tried + 1)
            rates.append(above)
        return rates

    def speeds(self) -> list[float]:
        """How many times as fast as plain decoding drafts of every length from 0 on are."""
        tokens, survival, speeds = 1.0, 1.0, [1.0]
        for length, rate in enumerate(self.acceptance(), start=1):
            survival *= rate
            tokens += survival
            speeds.append(tokens / self._costs.relative(length, length))
        return speeds

    def balance(self) -> float:
        """Plain forwards that drafting has saved so far, by what forwards are now known to cost."""
        spent = sum(count * self._costs.relative(*kind) for kind, count in self._kinds.items())
        return self._drafted_tokens - spent - self._lag

    def allowance(self) -> float:
        """Plain forwards that drafting may have lost by now."""
        return ALLOWED_AT_ONCE + ALLOWED_SHARE * (self._drafted_tokens + self._plain_forwards)

    def _learn(self, rows: Sequence[RowStep], verified: int) -> None:
        # Many rows say in few forwards what one row takes many for.
        memory = max(LEAST_MEMORY, 1 - len(rows) / EVIDENCE)
        self._failures = 0 if any(row.accepted for row in rows) else self._failures + 1
        if self._failures == FAILURES:
            memory, self._prior = min(memory, FAILING_MEMORY), min(self._prior, DOUBT)
        for index in range(self.longest):
            kept = memory if index < verified else UNSEEN_MEMORY
            self._tried[index] *= kept
            self._right[index] *= kept
            if index < verified:
                # Tokens that an end or a limit cut off were compared with nothing.
                tried = sum(row.accepted >= index and row.tokens > index for row in rows)
                self._note(index, tried, sum(row.accepted > index for row in rows))

    def _note(self, index: int, tried: int, right: int) -> None:
        self._tried[index] += tried
        self._right[index] += right
        if tried:
            kept = LONG_MEMORY**tried
            experience = self._experience
            experience.tried[index] = kept * experience.tried[index] + tried
            experience.right[index] = kept * experience.right[index] + right

    # ------------------------------------------------------------------------------------------------------- what it decides

    def _decide(self) -> int:
        if self.longest == 0:
            return 0
        if self._checking:
            self._checking -= 1
            return 0 if self._checking else self._checked_length
        if self._resting:
            return self._go_on_resting()
        best = self._best(WORTH_KEEPING)
        if best == 0:
            self._rest(failed=max(self.speeds()) < WORTH_KEEPING)
        elif self._since_check >= CHECK_EVERY and (
            self.speeds()[best] < SMALL_ADVANTAGE or self._costs.plain_age >= CHECK_LARGE_EVERY
        ):
            # The first of them still verifies a draft, the others are measured.
            self._since_check, self._checking, self._checked_length = 0, CHECKS + 1, best
            return 0
        return best

    def _best(self, worth: float) -> int:
        """The length to draft now, 0 for none."""
        speeds = self.speeds()
        # Costs beyond what was measured are a guess, so lengths grow step by step.
        most = min(self.longest, 2 * self._costs.longest_known + 1)
        lengths = [length for length in range(1, most + 1) if speeds[length] >= worth]
        if not lengths:
            return 0
        spare = self.balance() + self.allowance()
        lengths = [length for length in lengths if self._worst(length) <= spare]
        if not lengths:
            return 0
        best = max(lengths, key=speeds.__getitem__)
        if self.length in lengths and speeds[best] <= CLEARLY_BETTER * speeds[self.length]:
            return self.length
        return best

    def _worst(self, length: int) -> float:
        """Plain forwards lost where the draft on its way and the next one are wrong from their first token on.

        Rows that part by a draft do not meet again, so what that costs is lost for all that follows.
        """
        relative = self._costs.relative
        parting = 0.0 if self._parted else (self._costs.parted - 1) * self._remaining
        return relative(self._verifying, length) - 1 + relative(length, 0) - 1 + parting

    def _rest(self, *, failed: bool) -> None:
        """Drafting does not pay, or cannot be paid for."""
        gained = self.balance() > self._before
        self._resting, self._idle, self._failures = True, 0, 0
        self._wait = self._next_wait
        self._next_wait = SHORTEST_WAIT if gained or not failed else min(2 * self._next_wait, LONGEST_WAIT)

    def _go_on_resting(self) -> int:
        beginning = not self.lengths
        if not self._costs.plain_known:
            # Plain decoding is measured first. A trial after the prefill costs next to nothing.
            if beginning:
                self._begin_trial(self.longest, cost=0.0)
            return 0
        if self._heard or beginning:
            self._heard = False
            best = self._best(WORTH_STARTING)
            if best:
                self._resting = self._trying = False
                self._before = self.balance()
                if not beginning:
                    self._since_check = 0
                return best
            if beginning:
                self._begin_trial(self.longest, cost=0.0)
            elif not self._trying:
                self._idle, self._wait = 0, max(self._next_wait, int(self._trial_cost / TRIAL_SHARE))
                self._next_wait = min(2 * self._next_wait, LONGEST_WAIT)
            return 0
        if self._trying:
            return 0
        return self._try_again()

    def _try_again(self) -> int:
        if not self._can_try:
            self._tried, self._right = [0.0] * self.longest, [0.0] * self.longest
            self._prior, self._heard = OPTIMISM, True
            self.trials += 1
            return self._go_on_resting()
        spare = self.balance() + self.allowance()
        cost = {length: self._costs.relative(0, length) - 1 for length in range(1, self.longest + 1)}
        affordable = [p for p in cost if cost[p] <= spare and (p == 1 or cost[p] <= TRIAL_COST)]
        if affordable:
            self._begin_trial(affordable[-1], cost=cost[affordable[-1]])
        else:
            self._idle, self._wait = 0, SHORTEST_WAIT
        return 0

    def _begin_trial(self, length: int, *, cost: float) -> None:
        if not self._can_try:
            return
        self._tried, self._right = [0.0] * self.longest, [0.0] * self.longest
        self._prior = DOUBT
        self.trial, self._trying, self._trial_cost = length, True, cost
        self.trials += 1
