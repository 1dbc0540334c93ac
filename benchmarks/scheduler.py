"""Requests of mixed lengths that arrive at random: continuous admission beside batches that wait for their last row.

Three ways to serve the same requests, which arrive at the same times:

    generate    whoever waits when the engine is free (at most --rows) goes into one `model.generate`, as long as the longest asks
    gangs       the same groups, but every row has its own limit and leaves when it is done; nobody joins
    scheduler   continuous admission: newcomers join while others are decoded

each plainly and with the drafts that are asked for. Arrivals are a Poisson process whose rate is a share of what the scheduler
manages, plainly, when everything waits from the start; that is measured first. Latencies count from the arrival. All arms
must give the same tokens (float32: near-ties may differ, and are counted).

    python benchmarks/scheduler.py reference/model --output benchmarks/results/scheduler.json
    python benchmarks/scheduler.py MODEL TEXT

Without TEXT the prompts are pieces of a module of this interpreter's library. About three minutes on two cores with the
reference model. One JSON document last; --output is written after every arm.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from headway.decoding.handles import RequestHandle
from headway.decoding.requests import Completion, Request
from headway.decoding.scheduler import Scheduler
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance

Served = list[tuple[float, float, list[int]]]
"""Per request: seconds from its arrival to its first token and to its last, and its tokens."""


def make_requests(
    text: Sequence[int], count: int, *, prompts: Sequence[int], new: Sequence[int], seed: int
) -> list[Request]:
    """Pieces of a text as prompts; lengths are log-uniform between two limits each."""
    rng = random.Random(seed)

    def length(limits: Sequence[int]) -> int:
        return round(limits[0] * math.exp(rng.random() * math.log(limits[1] / limits[0])))

    asked = []
    for _ in range(count):
        size = length(prompts)
        start = rng.randrange(max(1, len(text) - size))
        asked.append(Request(tuple(text[start : start + size]), length(new), end_token_ids=()))
    return asked


def poisson(count: int, rate: float, *, seed: int) -> list[float]:
    """Arrival times in seconds."""
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


class Clock:
    """Seconds since the start of an arm."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        """Now."""
        return time.perf_counter() - self._start

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, moment - self()))


def decided(scheduler: Scheduler) -> list[dict[str, Any]]:
    """What the controllers of a scheduler chose, per size of the batch; the mean in the place of every length."""
    found = []
    for own in scheduler.report().to_dict()["control"]:
        lengths = own.pop("lengths")
        found.append(own | {"forwards": len(lengths), "mean_length": round(statistics.fmean(lengths), 3)})
    return found


def told(completion: Completion, delay: float) -> tuple[float, float, list[int]]:
    """What a scheduler measured, counted from the arrival instead of from the submission."""
    return completion.first_token_seconds + delay, completion.seconds + delay, completion.tokens


def continuous(
    model: Any, asked: list[Request], arrivals: list[float], *, rows: int, options: dict[str, Any]
) -> tuple[Served, list[dict[str, Any]]]:
    """Continuous admission, and what was decided about drafts."""
    scheduler, clock = Scheduler(model, max_rows=rows, max_waiting=len(asked), **options), Clock()
    handles: list[RequestHandle] = []
    delays: list[float] = []
    while len(handles) < len(asked) or not scheduler.idle:
        while len(handles) < len(asked) and arrivals[len(handles)] <= clock():
            delays.append(clock() - arrivals[len(handles)])
            handles.append(scheduler.submit(asked[len(handles)]))
        if scheduler.idle:
            clock.wait_until(arrivals[len(handles)])
        else:
            scheduler.step()
    served = [told(handle.result(), delay) for handle, delay in zip(handles, delays, strict=True)]
    return served, decided(scheduler)


def in_groups(
    asked: list[Request], arrivals: list[float], rows: int, serve: Callable[[list[Request], list[float], Clock], Served]
) -> Served:
    """Take whoever has arrived, serve them to their end, and look again."""
    clock = Clock()
    served: Served = []
    while len(served) < len(asked):
        begin = len(served)
        clock.wait_until(arrivals[begin])
        now = clock()
        group = [place for place in range(begin, min(begin + rows, len(asked))) if arrivals[place] <= now]
        served += serve([asked[place] for place in group], [arrivals[place] for place in group], clock)
    return served


def gangs(
    model: Any, asked: list[Request], arrivals: list[float], *, rows: int, options: dict[str, Any]
) -> tuple[Served, list[dict[str, Any]]]:
    """Groups whose rows leave when they are done, and what was decided about drafts."""
    scheduler = Scheduler(model, max_rows=rows, max_waiting=rows, **options)

    def serve(group: list[Request], since: list[float], clock: Clock) -> Served:
        delays = [clock() - arrival for arrival in since]
        found = scheduler.generate(group)
        return [told(completion, delay) for completion, delay in zip(found, delays, strict=True)]

    return in_groups(asked, arrivals, rows, serve), decided(scheduler)


def generate(
    model: Any, asked: list[Request], arrivals: list[float], *, rows: int, options: dict[str, Any]
) -> tuple[Served, list[dict[str, Any]]]:
    """Groups in one call of `generate`; a row has its tokens when the call returns."""

    def serve(group: list[Request], since: list[float], clock: Clock) -> Served:
        columns = max(len(request.prompt) for request in group)
        ids = torch.zeros(len(group), columns, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(group):
            ids[row, columns - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, columns - len(request.prompt) :] = 1
        longest = max(request.max_new_tokens for request in group)
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            **options,
        )
        now = clock()
        return [
            (now - arrival, now - arrival, found[row, columns:][: request.max_new_tokens].tolist())
            for row, (request, arrival) in enumerate(zip(group, since, strict=True))
        ]

    return in_groups(asked, arrivals, rows, serve), []


ARMS = {"generate": generate, "gangs": gangs, "scheduler": continuous}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """50, 95 and 99, in seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1], 4) for percent in (50, 95, 99)}


def summary(served: Served, arrivals: Sequence[float]) -> dict[str, Any]:
    """Throughput from the first arrival to the last token, and latencies."""
    end = max(arrival + total for arrival, (_, total, _) in zip(arrivals, served, strict=True))
    tokens = sum(len(row[2]) for row in served)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / (end - arrivals[0]), 1),
        "seconds": round(end - arrivals[0], 2),
        "latency_seconds": percentiles([total for _, total, _ in served]),
        "first_token_seconds": percentiles([first for first, _, _ in served]),
        "seconds_per_token_p50": round(statistics.median(total / len(new) for _, total, new in served), 5),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the arms and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder of a headway checkpoint")
    parser.add_argument(
        "text", type=Path, nargs="?", default=Path(argparse.__file__), help="where prompts are taken from"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON document here, after every arm")
    parser.add_argument("--requests", type=int, default=48, help="how many")
    parser.add_argument("--rows", type=int, default=8, help="most rows of a batch")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[32, 512], help="shortest and longest prompt")
    parser.add_argument("--new-tokens", type=int, nargs=2, default=[16, 256], help="shortest and longest continuation")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9], help="rates, in shares of the capacity")
    parser.add_argument(
        "--drafts", nargs="+", default=["plain", "auto"], choices=["plain", "longest", "auto"], help="lengths"
    )
    parser.add_argument("--executor", default="lean", choices=["eager", "lean"], help="what runs the model")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of requests and arrivals")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = MultiTokenLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = tokenizer(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    asked = make_requests(
        text, arguments.requests, prompts=arguments.prompt_tokens, new=arguments.new_tokens, seed=arguments.seed
    )
    lengths = {"plain": 0, "longest": None, "auto": "auto"}
    options = {name: {"num_draft_tokens": lengths[name], "executor": arguments.executor} for name in arguments.drafts}
    # The first run warms up; in the second everything waits from the start.
    plain = {"num_draft_tokens": 0, "executor": arguments.executor}
    continuous(model, asked[:4], [0.0] * 4, rows=arguments.rows, options=plain)
    at_once = [0.0] * len(asked)
    offline, _ = continuous(model, asked, at_once, rows=arguments.rows, options=plain)
    capacity = summary(offline, at_once)["tokens_per_second"]
    truth = [row[2] for row in offline]
    mean_new = sum(map(len, truth)) / len(truth)
    document: dict[str, Any] = {
        "benchmark": "scheduler",
        "setting": {
            "model": arguments.model.name,
            "requests": len(asked),
            "rows": arguments.rows,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "executor": arguments.executor,
            "threads": arguments.threads,
            "tokens": sum(map(len, truth)),
            "capacity_tokens_per_second": capacity,
        },
        "arms": [],
        "provenance": provenance(),
    }
    for load in arguments.loads:
        arrivals = poisson(len(asked), load * capacity / mean_new, seed=arguments.seed)
        for drafts, own in options.items():
            for arm, run in ARMS.items():
                served, control = run(model, asked, arrivals, rows=arguments.rows, options=own)
                differing = sum(row[2] != expected for row, expected in zip(served, truth, strict=True))
                found = {
                    "load": load,
                    "arm": arm,
                    "drafts": drafts,
                    **summary(served, arrivals),
                    "texts_that_differ": differing,
                }
                print(json.dumps(found), file=sys.stderr)
                document["arms"].append(found | {"control": control})
                if arguments.output:
                    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
