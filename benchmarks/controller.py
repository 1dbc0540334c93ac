"""Whether `num_draft_tokens="auto"` is ever slower than plain decoding: batches 1 to 32, three kinds of text, on and off.

    python benchmarks/controller.py --model FOLDER [--output benchmarks/results/controller.json] [--plot FILE.png]

With a model every draft is its own and the text is what it says about itself: "predictable" is its greedy continuation of
library code, "random" is drawn at a temperature at which it hardly knows what it will say, after random bytes, "alternating"
changes from one to the other every 64 tokens, by a logits processor. How often drafts are right in each part is in the result
("tokens_per_forward"). Without a model weights are random and drafts are scripted to be right with a given chance: costs are real
then, acceptance is simulated and called so.

A figure is seconds of plain decoding over seconds of the same tokens with drafts, prefill apart. The arms take turns, every other
turn in the opposite order; drafts that are always as long as can be, "off", take part in every fifth turn. The bound is the lower
end of a one-sided 95 % t interval of the mean logarithm. Rows that an earlier run with the same settings has left in --output are
kept. One JSON document last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from decoding_steps import SHAPES, build
from headway.decoding.blocks import stream_blocks
from headway.decoding.drafting import Block, ChainDrafter, Standing
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance

PROMPT, PART = 64, 64
OFF_EVERY = 5
TEXTS = ("predictable", "random", "alternating")
SHAPE = "10M"
RIGHT = {
    "predictable": lambda place: 0.9,
    "random": lambda place: 0.02,
    "alternating": lambda place: 0.9 if place // PART % 2 == 0 else 0.02,
}
# Quantile 0.95 of Student's t by degrees of freedom, at some places; the next smaller one is used, which is on the safe side.
STUDENT = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 6: 1.943, 9: 1.833, 14: 1.761, 19: 1.729, 29: 1.699, 59: 1.671}


class Alternating(LogitsProcessor):  # type: ignore[misc]
    """Sharpens the scores in every other part of the new text and flattens them in the parts between."""

    def __init__(self, prompt: int, temperature: float) -> None:
        self._prompt, self._temperature = prompt, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] -> [B, V]."""
        drawn = (input_ids.shape[1] - self._prompt) // PART % 2
        return scores / (self._temperature if drawn else 1e-4)


@dataclass
class Case:
    """One row of the table.

    Attributes:
        model: to decode with.
        text: kind.
        ids: prompts.
        tokens: new ones of every row.
        executor: what runs the model.
        temperature: of the random parts.
        simulated: whether drafts are scripted.
        truth: where they are, the plain continuation.
    """

    model: Any
    text: str
    ids: Tensor
    tokens: int
    executor: str
    temperature: float
    simulated: bool
    truth: list[list[int]] = field(default_factory=list)

    def decode(self, arm: int | str, *, seed: int) -> tuple[float, Any]:
        """Seconds after the prefill, and the result."""
        options: dict[str, Any] = {"do_sample": False}
        if not self.simulated and self.text == "random":
            options = {"do_sample": True, "temperature": self.temperature, "seed": seed}
        if not self.simulated and self.text == "alternating":
            processor = Alternating(self.ids.shape[1], self.temperature)
            options = {"do_sample": True, "seed": seed, "logits_processor": LogitsProcessorList([processor])}
        mask = torch.ones_like(self.ids)
        stream = stream_blocks(
            self.model,
            self.ids,
            attention_mask=mask,
            num_draft_tokens=arm,
            max_new_tokens=self.tokens,
            min_new_tokens=None,
            eos_token_id=None,
            pad_token_id=0,
            executor=self.executor,
            **options,
        )
        with scripted(self, seed) if self.truth else _nothing():
            next(stream)
            start = time.perf_counter()
            for _ in stream:
                pass
            return time.perf_counter() - start, stream.result

    def new(self, result: Any) -> list[list[int]]:
        """New tokens of each row."""
        return result.sequences[:, self.ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def scripted(case: Case, seed: int) -> Iterator[None]:
    """Let drafts of the known continuation be right as often as the kind of text says: simulated acceptance."""
    rng, block, vocabulary = random.Random(seed), ChainDrafter.block, case.model.config.vocab_size

    def drafted(self: ChainDrafter, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        found = block(self, standing, last_B1, depth=depth)
        rows = []
        for own, made in zip(case.truth, standing.made, strict=True):
            following = [*own[made : made + found.depth], *[0] * found.depth][: found.depth]
            right = [rng.random() < RIGHT[case.text](made + place) for place in range(found.depth)]
            rows.append(
                [token if good else (token + 1) % vocabulary for token, good in zip(following, right, strict=True)]
            )
        return Block(torch.cat((last_B1, torch.tensor(rows)), dim=1))

    ChainDrafter.block = drafted  # type: ignore[method-assign]
    try:
        yield
    finally:
        ChainDrafter.block = block  # type: ignore[method-assign]


def prompts(text: str, batch: int, *, vocabulary: int, simulated: bool) -> Tensor:
    """Prompts [B, PROMPT]: pieces of library code, or random bytes."""
    generator = torch.Generator().manual_seed(batch)
    if simulated or text == "random":
        return torch.randint(0, min(vocabulary, 256), (batch, PROMPT), generator=generator)
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (argparse, statistics, random, json))
    starts = [place * (len(source) - PROMPT) // batch for place in range(batch)]
    return torch.tensor([list(source[start : start + PROMPT]) for start in starts])


def bound(ratios: Sequence[float]) -> float:
    """Lower end of the one-sided 95 % interval of the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    quantile = STUDENT[max(degrees for degrees in STUDENT if degrees <= len(logs) - 1)]
    return math.exp(statistics.mean(logs) - quantile * statistics.stdev(logs) / math.sqrt(len(logs)))


def tokens_per_forward(result: Any, tokens: int) -> list[float]:
    """By parts of the text, pooled over rows: forwards count for the part in which they begin."""
    forwards, emitted = [0] * -(-tokens // PART), [0] * -(-tokens // PART)
    for row in result.acceptance.lengths:
        place = 1
        for length in row:
            forwards[place // PART] += 1
            emitted[place // PART] += length
            place += length
    return [round(many / max(1, count), 2) for count, many in zip(forwards, emitted, strict=True)]


def measure(case: Case, arms: dict[str, int | str], *, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    if case.simulated:
        case.truth = case.new(case.decode(0, seed=0)[1])
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    lengths: Counter[int] = Counter()
    differing = trials = 0
    per_forward: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        texts: dict[str, list[list[int]]] = {}
        taking = [arm for arm in arms if arm != "longest" or repeat % OFF_EVERY == 0]
        for arm in taking if repeat % 2 else reversed(taking):
            took, result = case.decode(arms[arm], seed=repeat)
            texts[arm] = case.new(result)
            # The first turn warms up, and leaves the controller what a process knows after its first request.
            if repeat:
                seconds[arm].append(took)
                per_forward[arm] = tokens_per_forward(result, case.tokens)
                if arm == "auto":
                    lengths.update(result.control.lengths[1:])
                    trials += result.control.trials
        rows = zip(texts["plain"], *(texts[arm] for arm in taking if arm != "plain"), strict=True)
        differing += sum(any(own != plain for own in others) for plain, *others in rows)
    row: dict[str, Any] = {
        "batch": len(case.ids),
        "text": case.text,
        "new_tokens": case.tokens,
        "turns": repeats,
        "plain_seconds": round(statistics.median(seconds["plain"]), 4),
    }
    for arm in ("longest", "auto"):
        beside = seconds["plain"] if arm == "auto" else seconds["plain"][OFF_EVERY - 1 :: OFF_EVERY]
        ratios = [before / after for before, after in zip(beside, seconds[arm], strict=True)]
        row[f"{arm}_over_plain"] = {
            "mean": round(statistics.geometric_mean(ratios), 4),
            "lower_bound_95": round(bound(ratios), 4),
            "least": round(min(ratios), 4),
            "largest": round(max(ratios), 4),
        }
    row["tokens_per_forward"] = per_forward
    row["lengths_chosen"] = {str(length): lengths[length] for length in sorted(lengths)}
    row["trials_per_generation"] = round(trials / repeats, 2)
    row["rows_that_differ_from_plain"] = differing
    print(json.dumps(row), file=sys.stderr)
    return row


def fitting_tokens(case: Case, arms: dict[str, int | str], arguments: argparse.Namespace) -> int:
    """New tokens that let the table be done in time: whole parts of both kinds, at least one of each."""
    case.tokens = PART
    turns = {arm: 1 + (arguments.repeats // OFF_EVERY if arm == "longest" else arguments.repeats) for arm in arms}
    cost = sum(turns[arm] * min(case.decode(of, seed=0)[0] for _ in range(2)) for arm, of in arms.items()) / PART
    share = 60 * arguments.minutes / (len(arguments.batches) * len(arguments.texts))
    parts = int(share / cost / (2 * PART))
    return int(2 * PART * max(1, min(parts, arguments.tokens // (2 * PART))))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up against batch, controller on and off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TEXTS), figsize=(12, 3.6), sharey=True)
    for axis, text in zip(axes, TEXTS, strict=True):
        own = sorted((row for row in rows if row["text"] == text), key=lambda row: row["batch"])
        for arm, label, style in (("auto", "controller on", "o-"), ("longest", "off: longest drafts", "s--")):
            axis.plot(
                [row["batch"] for row in own], [row[f"{arm}_over_plain"]["mean"] for row in own], style, label=label
            )
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{text} text")
        axis.set_xlabel("batch")
    axes[0].set_ylabel("times as fast as plain decoding")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the rows and one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Path, help="folder of a byte model with heads; without it acceptance is simulated"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON document here, after every row")
    parser.add_argument("--plot", type=Path, help="write the curves as a picture")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="rows per batch")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS, help="kinds of text")
    parser.add_argument("--tokens", type=int, default=384, help="most new tokens per row")
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="texts are shortened, to 128 tokens at least, to fit"
    )
    parser.add_argument("--repeats", type=int, default=30, help="paired turns, at least 10")
    parser.add_argument("--temperature", type=float, default=2.0, help="of random text")
    parser.add_argument("--executor", default="lean", choices=["eager", "lean"], help="what runs the model")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.repeats < 2 * OFF_EVERY:
        parser.error(f"--repeats needs at least {2 * OFF_EVERY}, for a spread of every arm")
    torch.set_num_threads(arguments.threads)
    simulated = arguments.model is None
    model = (
        build(SHAPES[SHAPE], torch.float32)
        if simulated
        else MultiTokenLM.from_pretrained(arguments.model).float().eval()
    )
    longest = model.num_future_tokens - 1
    arms: dict[str, int | str] = {"plain": 0, "longest": longest, "auto": "auto"}
    setting = {
        "model": f"random weights, {SHAPE}" if simulated else arguments.model.name,
        "weights_sha256": None
        if simulated
        else sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest(),
        "drafts": "scripted: acceptance is simulated, costs are real" if simulated else "the model's own",
        "drafted_tokens": longest,
        "dtype": "float32",
        "executor": arguments.executor,
        "threads": arguments.threads,
        "prompt_tokens": PROMPT,
        "repeats": arguments.repeats,
        "temperature_of_random_text": arguments.temperature,
    }
    document: dict[str, Any] = {"benchmark": "controller", "setting": setting, "rows": [], "provenance": provenance()}
    if arguments.output and arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if earlier.get("setting") == setting:
            document["rows"] = earlier["rows"]
    done = {(row["batch"], row["text"]) for row in document["rows"]}
    for batch, text in itertools.product(arguments.batches, arguments.texts):
        if (batch, text) in done:
            continue
        ids = prompts(text, batch, vocabulary=model.config.vocab_size, simulated=simulated)
        case = Case(model, text, ids, PART, arguments.executor, arguments.temperature, simulated)
        case.tokens = fitting_tokens(case, arms, arguments)
        row = measure(case, arms, repeats=arguments.repeats)
        document["rows"].append(row | {"commit": document["provenance"]["commit"]})
        if arguments.output:
            arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        plot(document["rows"], arguments.plot)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
