"""From the figures of single runs to one row per architecture, with the spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.evaluation.json_ready import json_ready
from headway.experiments.heads.measure import UNTRAINED
from headway.experiments.heads.variants import HeadVariant


@dataclass(frozen=True)
class Spread:
    """One figure over seeds.

    Attributes:
        mean: over the seeds.
        low: of the seeds.
        high: of the seeds.
        values: one per seed, in the order of the seeds.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds (n - 1 in the denominator); NaN for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def spread(values: Sequence[float | None]) -> Spread:
    """The spread of a figure; NaN throughout where a seed has none.

    >>> spread([1.0, 3.0]).mean, spread([1.0, 3.0]).high
    (2.0, 3.0)

    Args:
        values: one per seed, at least one.
    """
    numbers = tuple(math.nan if value is None else float(value) for value in values)
    if any(map(math.isnan, numbers)):
        return Spread(math.nan, math.nan, math.nan, numbers)
    return Spread(statistics.fmean(numbers), min(numbers), max(numbers), numbers)


@dataclass(frozen=True)
class VariantResult:
    """One architecture.

    Attributes:
        name: of the variant.
        source: where the architecture comes from.
        fields: options that make it.
        parameters: of the model.
        head_parameters: of them, those of the heads.
        base_layers: decoder layers on the base's side.
        reads_tokens: whether the heads are told the tokens between a position and their offset, so that their losses are
            of an easier task than those of heads which are not.
        nats: held-out loss of each offset.
        accuracy: held-out accuracy of each offset.
        acceptance_length: loop-free tokens per forward: of the first block that the decoder writes after held-out text.
        acceptance_rate: of offset 2, 3, ... there: accepted among those whose earlier offsets were.
        walk_length: tokens per forward along the held-out text itself.
        untrained_nats: by kind of control, loss of each offset.
        untrained_acceptance_length: by kind of control; NaN where the heads are part of the next-token path.
        bytes_plain: read by a plain step.
        bytes_drafted: read by a step that verifies and drafts.
        lossless_rows: decoded prompts, all seeds.
        identical_rows: of them, those whose every token was that of plain decoding.
        near_ties: of the others, those that part where two logits are within 1e-5.
        caches_relative: largest relative difference of a kept key or value, all seeds.
        cached_head_layers: cache layers of the heads.
        caches_right: whether all seeds passed.
        training_tokens_per_second: taking turns with the others.
        decoding: speeds, taking turns with the others.
    """

    name: str
    source: str
    fields: Mapping[str, Any]
    parameters: int
    head_parameters: int
    base_layers: int
    reads_tokens: bool
    nats: tuple[Spread, ...]
    accuracy: tuple[Spread, ...]
    acceptance_length: Spread
    acceptance_rate: tuple[Spread, ...]
    walk_length: Spread
    untrained_nats: Mapping[str, tuple[Spread, ...]]
    untrained_acceptance_length: Mapping[str, Spread]
    bytes_plain: int
    bytes_drafted: int
    lossless_rows: int
    identical_rows: int
    near_ties: int
    caches_relative: float
    cached_head_layers: int
    caches_right: bool
    training_tokens_per_second: float
    decoding: Mapping[str, Any]

    @property
    def lossless(self) -> bool:
        """Whether no row differs from plain decoding but by a near-tie."""
        return self.identical_rows + self.near_ties == self.lossless_rows

    @property
    def speedup_at_loop_free_acceptance(self) -> float:
        """Loop-free tokens per forward over the cost of a forward; NaN without heads."""
        cost = self.decoding.get("forward_cost")
        return math.nan if cost is None else self.acceptance_length.mean / float(cost)

    @property
    def margin_over_untrained(self) -> float:
        """Nats by which the trained heads beat the better control, at the offset and seed where they do least.

        NaN without heads.
        """
        margins = [
            min(control[index].values[seed] for control in self.untrained_nats.values()) - nats
            for index, trained in enumerate(self.nats)
            if index and self.untrained_nats
            for seed, nats in enumerate(trained.values)
        ]
        return min(margins, default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """All figures; NaN becomes None."""
        fields: dict[str, Any] = json_ready({**vars(self), "fields": dict(self.fields)})
        fields |= {
            "lossless": self.lossless,
            "speedup_at_loop_free_acceptance": json_ready(self.speedup_at_loop_free_acceptance),
            "margin_over_untrained": json_ready(self.margin_over_untrained),
        }
        return fields


@dataclass(frozen=True)
class HeadsResult:
    """A whole comparison.

    Attributes:
        variants: in the order of the tables.
        seeds: of the runs.
        settings: what all runs share.
        held_out_tokens: for likelihood and loop-free acceptance.
        seconds: wall time of each part, summed over the processes that took part.
        provenance: of the process that finished it.
        commits: of the checkouts that trained and that measured the runs.
    """

    variants: tuple[VariantResult, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    held_out_tokens: int
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any]
    commits: Mapping[str, tuple[str, ...]]

    @property
    def sound(self) -> bool:
        """Whether all decoding was lossless and all caches were right."""
        return all(variant.lossless and variant.caches_right for variant in self.variants)

    @property
    def beats_untrained(self) -> bool:
        """Whether every head of every seed has a lower loss than untrained ones."""
        return not any(variant.margin_over_untrained <= 0 for variant in self.variants)

    def to_json(self) -> dict[str, Any]:
        """All figures; NaN becomes None."""
        return {
            "experiment": "heads",
            "sound": self.sound,
            "beats_untrained": self.beats_untrained,
            "seeds": list(self.seeds),
            "held_out_tokens": self.held_out_tokens,
            "variants": [variant.to_json() for variant in self.variants],
            "settings": json_ready(dict(self.settings)),
            "seconds": json_ready(dict(self.seconds)),
            "commits": json_ready(dict(self.commits)),
            "provenance": json_ready(dict(self.provenance)),
        }


def variant_result(
    variant: HeadVariant, runs: Sequence[Mapping[str, Any]], *, training_speed: float, decoding: Mapping[str, Any]
) -> VariantResult:
    """One row from the figures of its runs.

    Args:
        variant: the architecture.
        runs: what `measure_model` gave, one per seed.
        training_speed: tokens per second.
        decoding: of `decoding_speeds`.
    """
    first = runs[0]
    controls = UNTRAINED if "untrained_heads" in first else ()
    return VariantResult(
        name=variant.name,
        source=variant.source,
        fields=variant.fields,
        parameters=first["parameters"],
        head_parameters=first["head_parameters"],
        base_layers=first["base_layers"],
        reads_tokens=first["reads_tokens"],
        nats=_per_offset(runs, lambda run: run["held_out"]["nats"]),
        accuracy=_per_offset(runs, lambda run: run["held_out"]["accuracy"]),
        acceptance_length=spread([run["held_out"]["first_block"]["mean_acceptance_length"] for run in runs]),
        acceptance_rate=_per_offset(runs, lambda run: run["held_out"]["first_block"]["acceptance_rate"]),
        walk_length=spread([run["held_out"]["walk"]["mean_acceptance_length"] for run in runs]),
        untrained_nats={
            kind: _per_offset([run["untrained_heads"][kind] for run in runs], lambda control: control["nats"])
            for kind in controls
        },
        untrained_acceptance_length={
            kind: spread(
                [run["untrained_heads"][kind].get("first_block", {}).get("mean_acceptance_length") for run in runs]
            )
            for kind in controls
        },
        bytes_plain=first["bytes_per_step"]["plain"]["total"],
        bytes_drafted=first["bytes_per_step"]["drafted"]["total"],
        lossless_rows=sum(run["lossless"]["rows"] for run in runs),
        identical_rows=sum(run["lossless"]["identical_rows"] for run in runs),
        near_ties=sum(run["lossless"]["near_ties"] for run in runs),
        caches_relative=max(run["caches"]["relative"] for run in runs),
        cached_head_layers=first["caches"]["head_layers"],
        caches_right=all(run["caches"]["right"] for run in runs),
        training_tokens_per_second=training_speed,
        decoding=decoding,
    )


def _per_offset(
    runs: Sequence[Mapping[str, Any]], figures: Callable[[Mapping[str, Any]], Sequence[float | None]]
) -> tuple[Spread, ...]:
    return tuple(spread(values) for values in zip(*(figures(run) for run in runs), strict=True))
