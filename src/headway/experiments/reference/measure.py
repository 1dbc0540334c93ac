"""What the reference model does: loss, acceptance, and speed beside other engines and models.

Every part is a function that returns a JSON-ready record, so that a caller can keep each at once and go on after a stop.

Legend: W windows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from headway.decoding.calibration.run import CalibrationOptions, calibrate
from headway.decoding.calibration.solve import Expectation
from headway.evaluation.json_ready import json_ready
from headway.evaluation.offset_logits import evaluation_mode
from headway.evaluation.text_walk import read_text, walk_texts
from headway.experiments.bench.arms import HUGGING_FACE, PLAIN, ArmOptions, build_arms
from headway.experiments.bench.figures import estimate, paired_ratio
from headway.experiments.bench.generation import Arm, Limits
from headway.experiments.bench.measure import Clock, run_rounds
from headway.experiments.bench.prompts import prompt_batches
from headway.experiments.bench.run import BenchOptions, run_bench
from headway.experiments.reference.corpora import MeasuredText
from headway.functional.tree import Tree
from headway.model.multi_token_lm import MultiTokenLM

REFERENCE = "reference"
BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Attributes:
        windows: per corpus, for loss and acceptance.
        window_bytes: T.
        prompts: per corpus, for speed on held-out packages; a named corpus gets half as many.
        prompt_bytes: length of a prompt.
        new_bytes: written after each.
        rounds: timed; each arm goes once in each.
        temperature: of drawn texts.
    """

    windows: int = 40
    window_bytes: int = 512
    prompts: int = 12
    prompt_bytes: int = 96
    new_bytes: int = 80
    rounds: int = 6
    temperature: float = 0.8


@dataclass(frozen=True)
class Measured:
    """Models and text.

    Attributes:
        reference: the model, float32, in eval mode.
        others: plain models to compare with, by name.
        held_out: packages that it has never seen.
        foreign: other corpora.
        export: makes GGUF files of its plain part for llama.cpp; None for none.
        calibrate: fits the tree of the arm "calibrated" to held-out windows first; it is stored in the folder that the model
            was loaded from, so that this should be a copy.
        pad_token_id: fills short rows.
        end_token_ids: of the end of text.
    """

    reference: MultiTokenLM
    others: Mapping[str, MultiTokenLM]
    held_out: MeasuredText
    foreign: Sequence[MeasuredText]
    export: Callable[[], Sequence[Path]] | None
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    calibrate: bool = False


Part = Callable[[], dict[str, Any]]


def parts(measured: Measured, amounts: Amounts, *, clock: Clock | None = None) -> dict[str, Part]:
    """The parts by name, in the order in which they are run: the most important figures first."""
    every: dict[str, Part] = {}
    corpora = (measured.held_out, *measured.foreign)
    for text in corpora:
        every[f"text: {text.name}"] = partial(text_part, measured, text)
    every[f"speed: {measured.held_out.name}"] = partial(speed_part, measured, measured.held_out, amounts, clock=clock)
    every["trade-off"] = partial(trade_off_part, measured, amounts, clock=clock)
    for text in measured.foreign:
        every[f"speed: {text.name}"] = partial(speed_part, measured, text, amounts, clock=clock, short=True)
    every[f"drawn: {measured.held_out.name}"] = partial(
        speed_part, measured, measured.held_out, amounts, clock=clock, short=True, drawn=True
    )
    return every


def text_part(measured: Measured, text: MeasuredText) -> dict[str, Any]:
    """Loss of every model in bits per byte, and acceptance of every draft along the text."""
    bits = {name: window_bits(model, text.windows) for name, model in _models(measured).items()}
    candidates = 4
    walked = [read_text(measured.reference, list(window), num_candidates=candidates) for window in text.windows]
    most = measured.reference.num_future_tokens - 1
    walks = {f"chain-{length}": walk_texts(walked, Tree.chain(length), reach=most + 1) for length in range(1, most + 1)}
    walks["lookup"] = walk_texts(walked, Tree.chain(0), lookup=most, reach=most + 1)
    walks["heads+lookup"] = walk_texts(walked, Tree.chain(most), lookup=most, reach=most + 1)
    return {
        "windows": len(text.windows),
        "window_bytes": len(text.windows[0]),
        "bits_per_byte": {name: json_ready(estimate_mean(values)) for name, values in bits.items()},
        "bits_per_byte_over_reference": {
            name: json_ready(estimate_mean([own - known for own, known in zip(values, bits[REFERENCE], strict=True)]))
            for name, values in bits.items()
            if name != REFERENCE
        },
        "walk": {
            name: {"tokens_per_forward": walk.tokens_per_forward, "blocks": walk.blocks, "copied": walk.copied}
            for name, walk in walks.items()
        },
    }


def window_bits(model: MultiTokenLM, windows: Sequence[bytes]) -> list[float]:
    """Bits per byte of the next byte, one mean per window; a window is read by itself from its first byte."""
    found = []
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for window in windows:
            ids_T = torch.tensor(list(window), device=device)
            logits_TV = model.base(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
            found.append(float(F.cross_entropy(logits_TV, ids_T[1:])) * BITS)
    return found


def estimate_mean(values: Sequence[float]) -> dict[str, float]:
    """A mean and its 95 % interval by the normal law: windows are many and near independent.

    >>> estimate_mean([1.0, 1.0])
    {'mean': 1.0, 'low': 1.0, 'high': 1.0}
    """
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half}


def speed_part(
    measured: Measured,
    text: MeasuredText,
    amounts: Amounts,
    *,
    clock: Clock | None,
    short: bool = False,
    drawn: bool = False,
) -> dict[str, Any]:
    """All arms on a corpus's prompts, taking turns; the figures of `headway bench` that pages need."""
    most = measured.reference.num_future_tokens - 1
    lengths = sorted({length for length in ((2, 3, 4, most) if short else range(1, most + 1)) if length <= most})
    chains = tuple(f"chain-{length}" for length in lengths)
    others = ("auto", "lookup") if short else ("tree", "calibrated", "dynamic", "auto", "lookup", "heads+lookup")
    engines = (HUGGING_FACE, "llama.cpp") if short else (HUGGING_FACE, "hf-static", "hf-lookup", "llama.cpp")
    calibration = None if short or not measured.calibrate else fitted(measured, amounts)
    rows = text.prompts.prompts[: amounts.prompts if not short else max(2, amounts.prompts // 2)]
    document = run_bench(
        measured.reference,
        replace(text.prompts, prompts=rows, texts=rows),
        BenchOptions(
            arms=ArmOptions(names=(PLAIN, *chains, *others, *engines), executors=("lean",), export=measured.export),
            rounds=amounts.rounds,
            warmup=1,
        ),
        limits_of(measured, amounts, drawn=drawn),
        name=REFERENCE,
        clock=clock,
    )
    (batch,) = document["batches"]
    kept = (
        "arm",
        "other_model",
        "engine",
        "executor",
        "plain",
        "differing_rows",
        "near_ties",
        "largest_gap",
        "unexplained_differences",
    )
    arms = []
    for figures in batch["arms"]:
        shown = figures["texts_without_loops"] or figures["all_texts"]
        arms.append(
            {name: figures[name] for name in kept}
            | {
                "tokens_per_second": shown["tokens_per_second"],
                "over_fastest_plain": shown["over_fastest_plain"],
                "tokens_per_forward": shown["tokens_per_forward"],
                "all_texts": {
                    name: figures["all_texts"][name]
                    for name in ("tokens_per_second", "over_fastest_plain", "tokens_per_forward")
                },
                "sampled_tokens_per_forward": figures["sampled_tokens_per_forward"],
                "break_even_tokens_per_forward": shown["break_even_tokens_per_forward"],
                "step": figures.get("step"),
            }
        )
    named = ("rows", "looping_rows", "counted_calls", "calls", "fastest_plain", "read_bytes_per_second", "headline")
    return {
        "setting": document["setting"],
        "calibration": calibration,
        "equal": document["equal"],
        "skipped": document["skipped"],
        **{name: batch[name] for name in named},
        "arms": arms,
        "over_others": over_others(batch),
        "machine": document["provenance"]["machine"],
    }


def fitted(measured: Measured, amounts: Amounts) -> dict[str, Any]:
    """Calibrate on the model's own continuations of held-out text, and say which tree it chose and what it expects.

    They are as long as those that are timed, and loops are left out of both.
    """
    text = [byte for window in measured.held_out.windows for byte in window]
    options = CalibrationOptions(
        executor="lean",
        windows=2 * amounts.prompts,
        prompt_tokens=amounts.prompt_bytes,
        new_tokens=amounts.new_bytes,
        num_ranks=8,
        lookup=True,
        rounds=5,
    )
    found = calibrate(measured.reference, text, options)
    return {
        "against": options.against,
        "continuations": len(found.texts),
        "looping": found.looping,
        "tree": json_ready(found.calibration.tree),
        "best": json_ready(_expected(found.best)),
        "plain": _expected(found.plain),
    }


def _expected(one: Expectation) -> dict[str, float]:
    return {"tokens_per_forward": one.tokens_per_forward, "tokens_per_second": one.tokens_per_second}


def over_others(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest draft of ours over every plain arm of the run, within rounds, on texts without loops where there are any.

    The fastest draft is the one of the best median ratio to the fastest plain engine.
    """
    which = "texts_without_loops" if batch["counted_calls"] else "all_texts"
    drafting = [one for one in batch["arms"] if one["engine"] == "headway" and not one["plain"]]
    best = max(drafting, key=lambda one: one[which]["over_fastest_plain"]["median"] or 0.0)

    def speeds(one: Mapping[str, Any]) -> list[float]:
        return [math.nan if speed is None else speed for speed in one[which]["tokens_per_second_rounds"]]

    return {
        "best": best["arm"],
        "texts": which,
        "over": {
            one["arm"]: json_ready(paired_ratio(speeds(best), speeds(one)))
            for one in batch["arms"]
            if one["plain"] or one["engine"] != "headway"
        },
    }


def limits_of(measured: Measured, amounts: Amounts, *, drawn: bool = False) -> Limits:
    """Where every arm stops."""
    temperature = amounts.temperature if drawn else None
    return Limits(amounts.new_bytes, measured.end_token_ids, measured.pad_token_id, temperature)


def trade_off_part(measured: Measured, amounts: Amounts, *, clock: Clock | None) -> dict[str, Any]:
    """Loss against tokens per second: each model plainly, the reference with drafts, all taking turns on the same prompts.

    Texts are drawn, since a greedy text may loop and loops are easy to draft for; what a plain step costs does not depend on
    the text.
    """
    limits = limits_of(measured, amounts, drawn=True)
    arms: list[Arm] = []
    for name, model in _models(measured).items():
        wanted: tuple[str, ...] = (PLAIN,)
        if name == REFERENCE:
            wanted = (PLAIN, *(f"chain-{k}" for k in range(1, model.num_future_tokens)), "auto")
        made, _ = build_arms(model, ArmOptions(names=wanted, executors=("lean",)), limits)
        arms += [replace(arm, name=f"{name}: {arm.name.partition('/')[0]}") for arm in made]
    rows = measured.held_out.prompts.prompts[: max(2, amounts.prompts * 2 // 3)]
    groups = prompt_batches(rows, batch=1, pad_token_id=measured.pad_token_id, device="cpu")
    rounds = run_rounds(arms, groups, rounds=amounts.rounds, warmup=1, clock=clock or Clock())
    every = range(len(groups))
    base = next(record for record in rounds.records if record.arm.name == f"{REFERENCE}: {PLAIN}")
    points = []
    for record in rounds.records:
        lengths = [row for one in record.generations for row in one.lengths if row]
        points.append(
            {
                "arm": record.arm.name,
                "model": record.arm.name.partition(":")[0],
                "tokens_per_second": json_ready(estimate(record.speeds(every))),
                "over_reference_plain": json_ready(paired_ratio(record.speeds(every), base.speeds(every))),
                "tokens_per_forward": sum(map(sum, lengths)) / sum(map(len, lengths)) if lengths else 1.0,
            }
        )
    return {
        "temperature": limits.temperature,
        "prompts": len(rows),
        "new_bytes": limits.max_new_tokens,
        "parameters": {name: model.num_parameters() for name, model in _models(measured).items()},
        "points": points,
    }


def _models(measured: Measured) -> dict[str, MultiTokenLM]:
    return {REFERENCE: measured.reference, **measured.others}
