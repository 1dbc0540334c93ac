"""Whether drafts ever change a text: random requests against plain decoding and transformers.

Every case is a function of its number and the seed: a tiny model (13 families, 19 kinds of heads), prompts, limits, end tokens,
stop strings, processors, sampling, a batch with padding on both sides, an executor and a draft of any kind. In float64 all ways
have to give one text; in float32 too, but where rounding decides (`headway.decoding.near_tie`), which is counted.

    python benchmarks/random_cases.py --cases 10000 --seed 0 --output benchmarks/results/random_cases.json
    python benchmarks/random_cases.py --only 4711                              # one case again, with all its details

What is done is kept beside the output (`.partial.jsonl`), and the same command goes on where it was stopped. One JSON document
last; exit status 1 where a case failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from headway.provenance import provenance
from random_case_check import Verdict, check
from random_requests import Case, draw_case

MODELS = 190
"""Tiny models of a run: ten of each kind of heads."""


def run_case(number: int, *, seed: int, models: int) -> dict[str, Any]:
    """One case as a line of the record; an exception is a failure with its traceback."""
    case = draw_case(number, seed=seed, models=models)
    try:
        verdict = check(case)
    except Exception as error:  # whatever happens to one case is a finding about that case
        verdict = Verdict(number, wrong=[{"comparison": "runs at all", "error": traceback.format_exc(limit=-4)}])
        verdict.compared.append(f"raised {type(error).__name__}")
    return verdict.to_json()


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    # What is imported stays: looking through it for garbage again and again takes a tenth of the time.
    gc.freeze()


def _work(arguments: tuple[list[int], int, int]) -> list[dict[str, Any]]:
    numbers, seed, models = arguments
    return [run_case(number, seed=seed, models=models) for number in numbers]


def records(numbers: list[int], *, seed: int, models: int, workers: int) -> Iterator[dict[str, Any]]:
    """Lines of the record of all numbers, in any order."""
    pieces = [(numbers[start : start + 20], seed, models) for start in range(0, len(numbers), 20)]
    if workers == 1:
        for piece in pieces:
            yield from _work(piece)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_quiet) as pool:
        for lines in pool.imap_unordered(_work, pieces):
            yield from lines


def dimensions(case: Case) -> Iterator[tuple[str, str]]:
    """What a case counts as."""
    yield "kind", case.kind
    yield "draft", case.kind_of_draft
    yield "executor", case.executor
    yield "family", case.model.family
    yield "heads", case.model.heads
    yield "future tokens", str(case.model.num_future_tokens)
    yield "vocabulary", str(case.model.vocabulary)
    yield "rows", str(case.batch)
    yield "new tokens at most", str(case.max_new_tokens)
    yield "drafts", "the heads' own" if case.spoilt is None else f"true with chance {case.spoilt}"
    yield "prompts read", "at once" if case.chunk in (None, 1024) else f"in pieces of {case.chunk}"
    yield (
        "ends",
        " and ".join(filter(None, ("end tokens" * bool(case.eos), "stop strings" * bool(case.stop_strings))))
        or "limit",
    )
    yield "padding", "none" if len(set(map(len, case.prompts))) == 1 else " and ".join(sorted(set(case.sides)))
    yield "samples of a prompt", str(case.samples)
    for name in case.processors or ("none",):
        yield "processors", name
    for name in case.sampling:
        yield "sampling", name


def summary(lines: Iterable[dict[str, Any]], *, seed: int, models: int) -> dict[str, Any]:
    """Counts over all cases."""
    counts: dict[str, Counter[str]] = {}
    compared: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []
    ties: list[dict[str, Any]] = []
    cases = tokens = forwards = accepted = 0
    surprise = variance = 0.0
    for line in sorted(lines, key=lambda line: int(line["number"])):
        case = draw_case(line["number"], seed=seed, models=models)
        cases += 1
        for dimension, value in dimensions(case):
            counts.setdefault(dimension, Counter())[value] += 1
        compared.update(line["compared"])
        tokens, forwards = tokens + line["tokens"], forwards + line["forwards"]
        accepted += line["accepted"]
        if line["refused"]:
            refused[line["refused"][:160]] += 1
        if line["surprise"]:
            surprise, variance = surprise + line["surprise"][0], variance + line["surprise"][1]
        if line["wrong"]:
            failed.append({"case": line["number"], "wrong": line["wrong"], "request": case.to_json()})
        ties += [{"case": line["number"], **tie} for tie in line["near_ties"]]
    return {
        "cases": cases,
        "failed": len(failed),
        "float32_near_ties": len(ties),
        "comparisons": dict(sorted(compared.items())),
        "new_tokens": tokens,
        "forwards_per_row": forwards,
        "accepted_drafts": accepted,
        "accepted_per_forward": round(accepted / max(forwards, 1), 4),
        "drawn_drafts_surprise_z": round(surprise / math.sqrt(variance), 3) if variance else None,
        "drafts_not_served_and_replaced_by_a_chain": dict(refused.most_common()),
        "counts": {name: dict(sorted(values.items())) for name, values in counts.items()},
        "failures": failed[:50],
        "near_ties": ties,
    }


def _read(path: Path, setting: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Lines of an earlier run with the same setting; a half-written last line is left out."""
    if not path.is_file():
        return {}
    first, *rest = path.read_text().splitlines() or [""]
    if not first or json.loads(first) != setting:
        raise SystemExit(f"{path} is of another setting ({first or 'empty'}); remove it or name another --output")
    done = {}
    for text in rest:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        done[int(line["number"])] = line
    return done


def main() -> None:
    """Run, keep, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of all cases and models")
    parser.add_argument("--models", type=int, default=MODELS, help="tiny models that the cases choose from")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--only", type=int, help="run this case alone and print everything about it")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON document here, and go on from what is beside it"
    )
    arguments = parser.parse_args()
    _quiet()
    if arguments.only is not None:
        line = run_case(arguments.only, seed=arguments.seed, models=arguments.models)
        case = draw_case(arguments.only, seed=arguments.seed, models=arguments.models)
        print(json.dumps({"request": case.to_json(), "verdict": line}))
        sys.exit(1 if line["wrong"] else 0)
    # What came of a case belongs to the code that ran: another commit begins anew.
    commit = provenance()["commit"]
    setting = {"seed": arguments.seed, "models": arguments.models, "commit": commit}
    kept = arguments.output.with_suffix(".partial.jsonl") if arguments.output else None
    done = _read(kept, setting) if kept else {}
    numbers = [number for number in range(arguments.cases) if number not in done]
    sink = kept.open("a") if kept else None
    if sink and not sink.tell():
        print(json.dumps(setting), file=sink, flush=True)
    began, failed = time.monotonic(), sum(bool(line["wrong"]) for line in done.values())
    for line in records(numbers, seed=arguments.seed, models=arguments.models, workers=arguments.workers):
        done[line["number"]] = line
        failed += bool(line["wrong"])
        if sink:
            print(json.dumps(line), file=sink, flush=True)
        if len(done) % 100 == 0:
            ties = sum(len(own["near_ties"]) for own in done.values())
            minutes = (time.monotonic() - began) / 60
            print(f"{len(done)} cases, {failed} failed, {ties} near-ties, {minutes:.1f} min", file=sys.stderr)
    if sink:
        sink.close()
    lines = [line for line in done.values() if line["number"] < arguments.cases]
    document = {
        "benchmark": "random_cases",
        "setting": setting | {"cases": arguments.cases, "dtypes": ["float64", "float32"]},
        **summary(lines, seed=arguments.seed, models=arguments.models),
        "provenance": provenance(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        assert kept is not None
        kept.unlink()
    print(json.dumps(document))
    sys.exit(1 if document["failed"] else 0)


if __name__ == "__main__":
    main()
