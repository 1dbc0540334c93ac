"""Runs one random case every way that has to give the same text, and says where it did not.

The truth is plain decoding by the same engine on the eager executor, which itself is held to transformers' own `generate`, row by
row, where the case is greedy. Against it stand the drafts that the case asks for, on its executor, in float64 and in float32; and
one row alone. Drawn drafts keep the law of a text and not the text of a seed: they are held to the same row alone, to the other
executor, to greedy text where only one token can be drawn, and, all cases together, to the law (`Verdict.surprise`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.decoding.drafting import Block, Standing
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.near_tie import Difference, differences, first_difference
from headway.decoding.statistics import GenerationResult
from headway.errors import DecodingError
from headway.functional.sampling import KeyedDraws
from headway.functional.tree import Tree
from random_models import build
from random_requests import READS_PADS, Case

DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROWS_HELD = 2
"""Rows of a batch that are held to transformers: a call for each, which costs as much as the whole batch here."""

COPIES = ("num_lookup_tokens", "lookup_ngram")


@dataclass
class Verdict:
    """What came of one case.

    Attributes:
        number: of the case.
        compared: comparisons made, by name.
        wrong: comparisons that failed, each with what differed.
        near_ties: float32 differences that rounding explains.
        refused: why the draft that was asked for is not served and a chain was taken; None where it is.
        forwards: of the drafted float64 run.
        accepted: drafts that stood in it.
        tokens: new tokens of it.
        surprise: of drawn drafts, sum over tokens of -log p minus its expectation, and the variance of that sum.
    """

    number: int
    compared: list[str] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None
    forwards: int = 0
    accepted: int = 0
    tokens: int = 0
    surprise: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


class Spoilt:
    """A drafter whose candidates are at times the true continuation, along one random path of its tree."""

    def __init__(self, inner: Any, truth: Sequence[Sequence[int]], *, chance: float, rng: random.Random) -> None:
        self._inner, self._truth, self._chance, self._rng = inner, truth, chance, rng

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `headway.decoding.drafting.Drafter.block`."""
        block: Block = self._inner.block(standing, last_B1, depth=depth)
        tokens_BM = block.tokens_BM.clone()
        trees = block.tree or Tree.chain(tokens_BM.shape[1] - 1)
        for row in standing.live:
            node, tree = 0, trees.of_row(row)
            for token in self._truth[row][standing.made[row] :]:
                if not tree.children[node]:
                    break
                node = self._rng.choice(tree.children[node])
                if self._rng.random() < self._chance:
                    tokens_BM[row, node] = token
        return dataclasses.replace(block, tokens_BM=tokens_BM)


class AnyLength:
    """A controller that chooses any length, none included, by drawn numbers instead of measured times.

    Attributes:
        trial: no draft is made that is not verified.
    """

    trial = 0

    def __init__(self, longest: int, rng: random.Random) -> None:
        self._longest, self._rng = longest, rng

    def begin(self, remaining: int = 0) -> int:
        """See `headway.decoding.controller.DraftController`."""
        return self._rng.choice([0, 0, self._longest, self._rng.randint(0, self._longest)])

    def end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is learnt."""

    def report(self) -> None:
        """Nothing to report."""


class Runs:
    """The ways to decode one case with one dtype."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.model = build(case.model, dtype)

    def text(self, result: GenerationResult) -> list[list[int]]:
        """New tokens of each row."""
        columns = max(map(len, self.case.prompts))
        counts = zip(result.sequences[:, columns:].tolist(), result.num_new_tokens.tolist(), strict=True)
        return [row[:count] for row, count in counts]

    def plain(self, **options: Any) -> GenerationResult:
        """One token per forward."""
        return self._run({"num_draft_tokens": 0}, **options)

    def drafted(
        self, truth: Sequence[Sequence[int]] | None, *, rows: list[int] | None = None, **options: Any
    ) -> GenerationResult:
        """As the case asks."""
        return self._run(self.case.drafts, truth=truth, rows=rows, **{"executor": self.case.executor} | options)

    def _run(
        self,
        drafts: dict[str, Any],
        *,
        truth: Sequence[Sequence[int]] | None = None,
        rows: list[int] | None = None,
        seeds: int | list[int] | None = None,
        executor: str = "eager",
        recorded: bool = False,
    ) -> GenerationResult:
        case = self.case
        ids, mask = case.padded(rows)
        kept = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True} if recorded else {}
        loop = ENGINE.start(
            self.model,
            ids,
            attention_mask=mask,
            executor=executor,
            prefill_chunk_tokens=case.chunk,
            **case.request(),
            **case.drawing(seeds),
            **drafts,
            **kept,
        )
        rng = random.Random(f"drafts {case.number}")
        if case.spoilt is not None and truth is not None and loop.drafter is not None:
            loop.drafter = Spoilt(loop.drafter, truth, chance=case.spoilt, rng=rng)
        if loop.controller is not None:
            loop.controller = AnyLength(loop.num_draft_tokens, rng)  # type: ignore[assignment]
        with decoding_context(self.model):
            loop.run()
        if loop.interrupted:
            raise KeyboardInterrupt
        return loop.result()

    def hugging_face(self, row: int) -> list[int]:
        """What the base's own `generate` adds to one row."""
        case = self.case
        ids = torch.tensor([case.prompts[row]])
        out = self.model.base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **case.request())
        return trimmed(out[0, ids.shape[1] :].tolist(), case)


def trimmed(tokens: list[int], case: Case) -> list[int]:
    """Without what follows an end token; a row alone has no other padding."""
    end = next((place for place, token in enumerate(tokens) if token in case.eos), None)
    return tokens if end is None else tokens[: end + 1]


def check(case: Case) -> Verdict:
    """Run the case every way.

    Raises:
        KeyboardInterrupt: Ctrl-C inside a generation.
    """
    verdict = Verdict(case.number)
    case = _served(case, verdict)
    _check_drafts(verdict, case, "float64")
    if case.kind != "drawn":
        # With drawn drafts a seed's text depends on rounded drafts too, and no logit would tell where.
        _check_drafts(verdict, case, "float32")
    return verdict


def _served(case: Case, verdict: Verdict) -> Case:
    """The case, with a chain in place of a draft that its model does not serve."""
    if not {"tree", "drafts"} & case.drafts.keys():
        return case
    ids, mask = case.padded()
    try:
        model = build(case.model, torch.float64)
        ENGINE.start(model, ids, attention_mask=mask, **case.request(), **case.drawing(), **case.drafts)
    except DecodingError as error:
        verdict.refused = str(error)
        kept = {name: value for name, value in case.drafts.items() if name not in ("tree", "drafts", *COPIES)}
        return dataclasses.replace(case, drafts=kept)
    return case


def _check_drafts(verdict: Verdict, case: Case, dtype: str) -> None:
    runs = Runs(case, DTYPES[dtype])
    drawn = case.kind == "drawn"
    text = None if drawn else runs.text(runs.plain())
    result = runs.drafted(text, recorded=drawn)
    found = runs.text(result)
    if text is not None:
        again = partial(runs.plain, recorded=True), partial(runs.drafted, text, recorded=True)
        _compare(verdict, f"{dtype}: drafted = plain", runs, text, found, again=again)
    if case.alone is not None:
        _check_alone(verdict, f"{dtype}: row alone = row in batch", runs, found if text is None else text)
    if dtype == "float64":
        verdict.forwards = int(result.acceptance.forwards.sum())
        verdict.accepted = sum(result.acceptance.accepted)
        verdict.tokens = int(result.num_new_tokens.sum())
        if drawn:
            verdict.surprise = _surprise(result, found)
        _check_truth(verdict, runs, found if text is None else text)


def _check_truth(verdict: Verdict, runs: Runs, text: list[list[int]]) -> None:
    """Transformers' own greedy text; the other executor's drawn one; the greedy one where nothing else can be drawn."""
    case = runs.case
    if case.kind == "greedy" and not case.model.changes_base:
        rows = list(range(len(text)))
        if not READS_PADS.isdisjoint(case.processors):
            # These would see padding; and transformers' own float64 logits of padded prompts are not numbers.
            rows = [row for row in rows if len(case.prompts[row]) == max(map(len, case.prompts))]
        for row in random.Random(f"rows {case.number}").sample(rows, min(ROWS_HELD, len(rows))):
            _compare(verdict, "float64: plain = Hugging Face", runs, [runs.hugging_face(row)], [text[row]], first=row)
    if case.kind == "drawn" and case.model.lean:
        other = runs.drafted(None, executor="eager" if case.executor == "lean" else "lean")
        _compare(verdict, "float64: drawn drafts, eager = lean", runs, text, runs.text(other))
    if case.kind == "drawn, one token":
        greedy = Runs(dataclasses.replace(case, kind="greedy", samples=1), runs.dtype)
        own = [row for row in greedy.text(greedy.plain()) for _ in range(case.samples)]
        _compare(verdict, "float64: one token can be drawn = greedy", runs, own, text)


def _check_alone(verdict: Verdict, what: str, runs: Runs, text: list[list[int]]) -> None:
    """One prompt, with everything else taken out of its batch but the columns."""
    case, prompt = runs.case, runs.case.alone
    assert prompt is not None
    mine = slice(prompt * case.samples, (prompt + 1) * case.samples)
    seeds = list(case.seeds[mine]) if isinstance(case.seeds, tuple) else case.seeds
    truth = None if case.kind == "drawn" else text[mine]
    run = partial(runs.drafted, truth, rows=[prompt], seeds=seeds)
    again = partial(runs.plain, rows=[prompt], seeds=seeds, recorded=True), partial(run, recorded=True)
    _compare(verdict, what, runs, text[mine], runs.text(run()), first=mine.start, again=again)


def _compare(
    verdict: Verdict,
    what: str,
    runs: Runs,
    expected: list[list[int]],
    found: list[list[int]],
    *,
    first: int = 0,
    again: tuple[Callable[[], GenerationResult], Callable[[], GenerationResult]] | None = None,
) -> None:
    """Note what differs; in float32 `again` makes both texts once more, with what the model said."""
    verdict.compared.append(what)
    places = [first_difference(got, wanted) for got, wanted in zip(found, expected, strict=True)]
    if all(place is None for place in places):
        return
    reports: list[Difference] = []
    if runs.dtype == torch.float32 and again is not None:
        plain, other = (run() for run in again)
        uniform = None if runs.case.kind == "greedy" else partial(_uniform, runs.case, first)
        reports = differences(plain, other, dtype=runs.dtype, uniform=uniform)
    for index, place in enumerate(places):
        if place is None:
            continue
        report = next((own for own in reports if own.row == index and own.position == place), None)
        entry = {"comparison": what, "row": first + index, "position": place, "expected": expected[index][place:][:4]}
        entry |= {"found": found[index][place:][:4], "report": None if report is None else report.to_json()}
        near = report is not None and report.verdict == "near-tie"
        (verdict.near_ties if near else verdict.wrong).append(entry)


def _uniform(case: Case, first: int, row: int, place: int) -> float:
    """The number that decided about a row's token."""
    if isinstance(case.seeds, tuple):
        return KeyedDraws(case.seeds[first + row], 0, 0).uniform(place)
    return KeyedDraws(case.seeds, row, 0).uniform(place)


def _surprise(result: GenerationResult, texts: list[list[int]]) -> tuple[float, float]:
    """Sum over all new tokens of -log p minus its expectation under p, and the variance of the sum."""
    assert result.scores is not None
    total = variance = 0.0
    for row, tokens in enumerate(texts):
        for place, token in enumerate(tokens):
            probs_V = result.scores[place][row].double().softmax(dim=-1)
            surprise_V = -probs_V.clamp(min=1e-300).log()
            mean = float((probs_V * surprise_V).sum())
            total += float(surprise_V[token]) - mean
            variance += float((probs_V * surprise_V**2).sum()) - mean**2
    return total, variance
