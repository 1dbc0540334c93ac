"""One benchmark: arms, batches, rounds; what it found as one document.

Legend: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from headway.decoding.compare import NEAR_TIE_GAP, first_difference, top_two_gap
from headway.errors import ConfigError
from headway.evaluation.json_ready import json_ready
from headway.experiments.bench.arms import HUGGING_FACE, INT8, PLAIN, ArmOptions, build_arms, run_own
from headway.experiments.bench.figures import Estimate, break_even, break_even_batch, estimate, paired_ratio
from headway.experiments.bench.generation import Arm, Limits, PromptBatch
from headway.experiments.bench.measure import ArmRecord, Clock, Rounds, run_rounds
from headway.experiments.bench.prompts import BenchPrompts, prompt_batches
from headway.experiments.bench.steps import bytes_of, head_floors, step_parts, weight_reader
from headway.experiments.bench.walks import arm_walks, chain_walks
from headway.functional.repetition import loops
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance


@dataclass(frozen=True)
class BenchOptions:
    """How much is measured.

    Attributes:
        arms: which ways to decode.
        batches: rows that are decoded together.
        rounds: timed.
        warmup: rounds before them.
    """

    arms: ArmOptions = field(default_factory=ArmOptions)
    batches: tuple[int, ...] = (1,)
    rounds: int = 7
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.rounds < 1 or self.warmup < 0:
            raise ConfigError(
                f"a benchmark needs batches and rounds of at least 1: got batches {self.batches}, rounds {self.rounds}, "
                f"warmup {self.warmup}"
            )


def run_bench(
    model: MultiTokenLM,
    prompts: BenchPrompts,
    options: BenchOptions,
    limits: Limits,
    *,
    name: str,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything that was asked for.

    Args:
        model: in eval mode.
        prompts: what is continued.
        options: how much.
        limits: where every arm stops.
        name: of the model, for the document.
        clock: instead of the machine's own.
        progress: is told what is going on, line by line.

    Returns:
        The JSON-ready document; its layout is in docs/guides/bench.md.
    """
    clock = clock or Clock()
    progress("preparing the arms")
    arms, skipped = build_arms(model, options.arms, limits)
    weight = model.family.lm_head.weight
    read_weights, read_bytes = weight_reader(model)
    batches = []
    sampled: dict[str, float] = {}
    for size in options.batches:
        groups = prompt_batches(prompts.prompts, batch=size, pad_token_id=limits.pad_token_id, device=weight.device)
        rounds = run_rounds(
            arms,
            groups,
            rounds=options.rounds,
            warmup=options.warmup,
            clock=clock,
            read_weights=read_weights,
            progress=progress,
        )
        skipped += rounds.skipped
        if not sampled:
            progress("sampling")
            sampled = _sampled(model, arms, groups, limits)
        progress(f"batch {size}: parts of a step")
        batches.append(_batch_document(model, rounds, groups, limits, read_bytes=read_bytes, clock=clock))
    progress("acceptance along the prompts' own text")
    walk = chain_walks(model, prompts.texts)
    chains = {f"chain-{one.num_draft_tokens}": one.mean_acceptance_length for one in walk}
    along_text = arm_walks(model, arms, prompts.texts)
    for document in batches:
        for figures in document["arms"]:
            length = along_text.get(figures["arm"], chains.get(figures["arm"].partition("/")[0]))
            even = figures["all_texts"]["break_even_tokens_per_forward"]
            figures["sampled_tokens_per_forward"] = sampled.get(figures["arm"])
            figures["walk_tokens_per_forward"] = length
            figures["expected_over_fastest_plain_along_text"] = None if length is None else length / even
        document["expected_best_along_text"] = _expected_best(document["arms"])
    return {
        "benchmark": "bench",
        "model": name,
        "num_future_tokens": model.num_future_tokens,
        "heads": model.mtp_config.heads if model.num_future_tokens > 1 else None,
        "parameters": model.num_parameters(),
        "setting": {
            "prompts": prompts.source,
            "num_prompts": len(prompts.prompts),
            "prompt_tokens": [min(map(len, prompts.prompts)), max(map(len, prompts.prompts))],
            "max_new_tokens": limits.max_new_tokens,
            "batches": list(options.batches),
            "rounds": options.rounds,
            "warmup": options.warmup,
            "temperature": limits.temperature,
            "seed": limits.seed,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "threads": torch.get_num_threads(),
            "near_tie_gap": NEAR_TIE_GAP,
        },
        "walk": [json_ready(one) for one in walk],
        "break_even_batch": json_ready(_break_even_batches(batches)),
        "head_floors": json_ready(head_floors(model, num_draft_tokens=max(1, model.num_future_tokens - 1))),
        "batches": json_ready(batches),
        "skipped": json_ready(skipped),
        "equal": all(not figures["unexplained_differences"] for batch in batches for figures in batch["arms"]),
        "provenance": provenance(),
    }


def _batch_document(
    model: MultiTokenLM,
    rounds: Rounds,
    groups: Sequence[PromptBatch],
    limits: Limits,
    *,
    read_bytes: int,
    clock: Clock,
) -> dict[str, Any]:
    by_name = {record.arm.name: record for record in rounds.records}
    reference = next(
        record
        for record in rounds.records
        if record.arm.plain and record.arm.engine == "headway" and not record.arm.other_model
    )
    looping = [[loops(row) for row in generation.tokens] for generation in reference.generations]
    everything = list(range(len(groups)))
    counted = [group for group in everything if not any(looping[group])]
    comparisons = {record.arm.name: _compare(model, record, reference, groups, limits) for record in rounds.records}
    plains = [
        record for record in rounds.records if record.arm.plain and not comparisons[record.arm.name]["other_text"]
    ]
    # Where every text loops there is no headline, but the figures of all texts still need their denominator.
    shown = counted or everything
    fastest = max(plains, key=lambda record: _gain(record, reference, shown))
    bandwidth = read_bytes / estimate(rounds.read_seconds).median
    arms = []
    for record in rounds.records:
        figures: dict[str, Any] = {
            "arm": record.arm.name,
            "engine": record.arm.engine,
            "executor": record.arm.executor,
            "plain": record.arm.plain,
            "other_model": record.arm.other_model,
            "texts_without_loops": _speeds(record, fastest, counted, looping),
            "all_texts": _speeds(record, fastest, everything, None),
            **comparisons[record.arm.name],
        }
        if record.arm.engine == "headway":
            own_name = INT8 if record.arm.other_model else PLAIN
            own_plain = by_name[own_name + ("" if record.arm.executor == "eager" else f"/{record.arm.executor}")]
            if not record.arm.plain:
                figures["over_own_plain"] = paired_ratio(record.speeds(shown), own_plain.speeds(shown))
            figures["step"] = _step(model, record, groups, limits, shown, bandwidth, clock=clock)
        arms.append(figures)
    return {
        "batch": groups[0].rows,
        "calls": len(groups),
        "rows": sum(map(len, looping)),
        "looping_rows": sum(map(sum, looping)),
        "counted_calls": len(counted),
        "fastest_plain": fastest.arm.name,
        "read_bytes_per_second": bandwidth,
        "headline": _headline(rounds.records, fastest, comparisons, counted, by_name.get(HUGGING_FACE)),
        "arms": arms,
    }


def _speeds(
    record: ArmRecord, fastest: ArmRecord, groups: Collection[int], looping: Sequence[Sequence[bool]] | None
) -> dict[str, Any] | None:
    """Figures over some of the calls; tokens per forward leave out looping rows, not whole calls."""
    rows = [
        row
        for group, generation in enumerate(record.generations)
        for place, row in enumerate(generation.lengths)
        if row and (looping is None or not looping[group][place])
    ]
    forwards = sum(map(len, rows))
    per_forward = sum(map(sum, rows)) / forwards if forwards else math.nan
    if not groups:
        return None
    if math.isnan(per_forward):
        total = sum(record.generations[group].forwards for group in groups)
        tokens = sum(record.generations[group].later_tokens for group in groups)
        rows_per_call = len(record.generations[0].tokens)
        per_forward = tokens / (total * rows_per_call) if total else math.nan
    over = paired_ratio(record.speeds(groups), fastest.speeds(groups))
    chosen = [record.generations[group] for group in groups]
    offsets = max((len(generation.drafted) for generation in chosen), default=0)
    drafted = [sum(one.drafted[k] for one in chosen if k < len(one.drafted)) for k in range(offsets)]
    accepted = [sum(one.accepted[k] for one in chosen if k < len(one.accepted)) for k in range(offsets)]
    return {
        "tokens_per_second": estimate(record.speeds(groups)),
        "tokens_per_second_rounds": record.speeds(groups),
        "whole_call_tokens_per_second": estimate(record.whole_speeds(groups)),
        "cpu_ms_per_token": _scaled(estimate(record.cpu_per_token(groups)), 1000),
        "prefill_ms": _scaled(estimate(record.prefill_seconds(groups)), 1000),
        "new_tokens": sum(len(row) for generation in chosen for row in generation.tokens),
        "forwards": sum(generation.forwards for generation in chosen),
        "tokens_per_forward": per_forward,
        "acceptance_rate": [a / d if d else math.nan for a, d in zip(accepted, drafted, strict=True)],
        "over_fastest_plain": over,
        "break_even_tokens_per_forward": math.nan if record.arm.plain else break_even(per_forward, over.median),
    }


def _compare(
    model: MultiTokenLM, record: ArmRecord, reference: ArmRecord, groups: Sequence[PromptBatch], limits: Limits
) -> dict[str, Any]:
    """Rows whose tokens are not the plain arm's, and how near the choices were at which they part.

    Drawn texts of other engines follow other generators and are not compared; those of ours are, seed by seed.
    """
    if limits.temperature is not None and record.arm.engine != "headway":
        return {
            "compared": False,
            "differing_rows": None,
            "near_ties": None,
            "largest_gap": None,
            "unexplained_differences": 0,
            "other_text": record.arm.other_model,
            "changed_between_rounds": record.changed,
            "note": None,
        }
    gaps = []
    for group, made, wanted in zip(groups, record.generations, reference.generations, strict=True):
        for row, (tokens, plain) in enumerate(zip(made.tokens, wanted.tokens, strict=True)):
            place = first_difference(tokens, plain)
            if place is not None:
                gaps.append(top_two_gap(model, [*group.prompt(row), *plain[:place]]))
    near = sum(gap < NEAR_TIE_GAP for gap in gaps)
    exact = (
        model.family.lm_head.weight.dtype in (torch.float32, torch.float64)
        and not record.arm.other_weights
        and limits.temperature is None
    )
    return {
        "compared": True,
        "differing_rows": len(gaps),
        "near_ties": near,
        "largest_gap": max(gaps, default=None),
        # Half precision rounds blocks and single positions differently, and rounding moves the edges between tokens that
        # are drawn: told, but no error.
        "unexplained_differences": len(gaps) - near if exact else 0,
        "other_text": record.arm.other_model or (len(gaps) > near if exact or record.arm.other_weights else False),
        "changed_between_rounds": record.changed,
        "note": next((made.note for made in record.generations if made.note), None),
    }


def _step(
    model: MultiTokenLM,
    record: ArmRecord,
    groups: Sequence[PromptBatch],
    limits: Limits,
    shown: Collection[int],
    bandwidth: float,
    *,
    clock: Clock,
) -> dict[str, Any]:
    seconds = estimate(record.step_seconds(shown))
    read = bytes_of(model, record.arm, groups[0].prompt(0))
    floor = math.nan if read is None else (read.weights + groups[0].rows * read.cache) / bandwidth
    parts = step_parts(model, record.arm, groups[0], limits, clock=clock)
    return {
        "ms": _scaled(seconds, 1000),
        "bytes": None if read is None else read.weights + groups[0].rows * read.cache,
        "byte_floor_ms": floor * 1000,
        "share_of_bandwidth_limit": floor / seconds.median if seconds.median > 0 else math.nan,
        "parts_ms": None
        if parts is None
        else {"verify": parts.verify * 1000, "draft": parts.draft * 1000, "rest": parts.rest * 1000},
    }


def _headline(
    records: Sequence[ArmRecord],
    fastest: ArmRecord,
    comparisons: dict[str, dict[str, Any]],
    counted: Collection[int],
    hugging_face: ArmRecord | None,
) -> dict[str, Any] | None:
    """Engine gain and speculation gain apart, on texts that do not loop; None where all loop."""
    if not counted:
        return None
    # What runs rounded weights is another model: shown, and never compared with.
    own = [record for record in records if record.arm.engine == "headway" and not record.arm.other_model]
    plain = max((record for record in own if record.arm.plain), key=lambda record: _gain(record, fastest, counted))
    drafting = [
        record for record in own if not record.arm.plain and not comparisons[record.arm.name]["unexplained_differences"]
    ]
    best = max(drafting, key=lambda record: _gain(record, fastest, counted), default=None)
    engine_gain = None
    if hugging_face is not None:
        engine_gain = {
            record.arm.name: paired_ratio(record.speeds(counted), hugging_face.speeds(counted))
            for record in own
            if record.arm.plain
        }
    return {
        "fastest_plain": fastest.arm.name,
        "fastest_own_plain": plain.arm.name,
        "engine_gain_over_hugging_face": engine_gain,
        "best": None if best is None else best.arm.name,
        "speculation_gain": None if best is None else paired_ratio(best.speeds(counted), fastest.speeds(counted)),
        "best_over_own_plain": None if best is None else paired_ratio(best.speeds(counted), plain.speeds(counted)),
        "best_over_hugging_face": None
        if best is None or hugging_face is None
        else paired_ratio(best.speeds(counted), hugging_face.speeds(counted)),
    }


def _sampled(
    model: MultiTokenLM, arms: Sequence[Arm], groups: Sequence[PromptBatch], limits: Limits
) -> dict[str, float]:
    """Tokens per forward at temperature 1 of every arm that drafts; executors give the same texts, one is asked."""
    found: dict[str, float] = {}
    for arm in arms:
        if arm.engine != "headway" or arm.plain:
            continue
        # What the controller chooses depends on how fast the executor is.
        twin = arm.name if arm.heads is None else arm.name.partition("/")[0]
        if twin not in found:
            arguments = replace(limits, temperature=1.0).own_arguments() | arm.arguments
            lengths = [row for group in groups for row in run_own(model, group, arguments, lambda: None).lengths if row]
            found[twin] = sum(map(sum, lengths)) / sum(map(len, lengths)) if lengths else math.nan
        found[arm.name] = found[twin]
    return found


def _break_even_batches(batches: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Per arm that drafts, where its speed-up falls below 1; of a single batch nothing can be said."""
    points: dict[str, list[tuple[int, float]]] = {}
    for batch in batches if len(batches) > 1 else ():
        for figures in batch["arms"]:
            shown = figures["texts_without_loops"] or figures["all_texts"]
            ratio = shown["over_fastest_plain"].median
            ours = figures["engine"] == "headway" and not figures["other_model"]
            if ours and not figures["plain"] and math.isfinite(ratio):
                points.setdefault(figures["arm"], []).append((batch["batch"], ratio))
    return {name: break_even_batch(ratios) for name, ratios in points.items() if len(ratios) > 1}


def _expected_best(arms: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The draft that pays most along real text: its measured cost of a forward with its acceptance there."""
    name = "expected_over_fastest_plain_along_text"
    known = [figures for figures in arms if figures[name] is not None and math.isfinite(figures[name])]
    best = max(known, key=lambda figures: float(figures[name]), default=None)
    return None if best is None else {"arm": best["arm"], "over_fastest_plain": best[name]}


def _gain(record: ArmRecord, over: ArmRecord, groups: Collection[int]) -> float:
    """To rank arms by: within rounds, so that no arm wins by a round in which all were fast; 0 where nothing is known."""
    ratio = paired_ratio(record.speeds(groups), over.speeds(groups)).median
    return ratio if math.isfinite(ratio) else 0.0


def _scaled(one: Estimate, factor: float) -> Estimate:
    return Estimate(one.median * factor, one.low * factor, one.high * factor)
