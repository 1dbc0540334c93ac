"""Random requests to `generate`, each a function of its number.

Prompts, limits, ends, processors, drafts, batches and executors are drawn. A `Case` says everything about one request in plain
values, so that it can be written to JSON and made again alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from headway.functional.tree import Tree, default_tree
from random_models import LETTERS, ModelSpec, letters_tokenizer, model_specs

Kind = Literal["greedy", "sampled", "drawn", "drawn, one token"]

READS_PADS = frozenset(
    {"repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "min_length", "odd or even"}
)
"""Processors that look at the whole rectangle of ids, padding included, in transformers as here."""


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        number: of the case; with the seed of the run it decides everything else.
        model: which.
        kind: "greedy"; "sampled" with arg-max, tree or copied drafts; "drawn", sampled with drawn drafts; "drawn, one token",
            the same where only the likeliest token can be drawn, so that the text must be the greedy one.
        prompts: per row its tokens.
        sides: per row where its padding is, "l" or "r".
        pad: the padding id.
        max_new_tokens: limit.
        eos: ids that end a text.
        stop_strings: strings that do.
        processors: logits processors by transformers' names, and two of our own.
        sampling: temperature, top_k, top_p, min_p.
        seeds: one for all rows, or one per row.
        samples: `num_return_sequences`.
        drafts: headway's options for the draft.
        spoilt: chance that a drafted token is the true one, where drafts are scripted; None where the heads' own are kept.
        executor: "eager" or "lean".
        chunk: `prefill_chunk_tokens`.
        alone: a row that is also decoded alone.
    """

    number: int
    model: ModelSpec
    kind: Kind
    prompts: tuple[tuple[int, ...], ...]
    sides: str
    pad: int
    max_new_tokens: int
    eos: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    processors: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    seeds: int | tuple[int, ...] = 0
    samples: int = 1
    drafts: dict[str, Any] = field(default_factory=dict)
    spoilt: float | None = None
    executor: str = "eager"
    chunk: int | None = 1024
    alone: int | None = None

    @property
    def batch(self) -> int:
        """Rows, samples included."""
        return len(self.prompts) * self.samples

    @property
    def kind_of_draft(self) -> str:
        """For counts."""
        source: str = self.drafts.get("drafts", "heads")
        tree = self.drafts.get("tree")
        if self.drafts.get("num_draft_tokens") == "auto":
            return "auto, tree" if tree else "auto, chain"
        if source == "lookup":
            return source
        shape = "chain" if tree is None else tree if isinstance(tree, str) else "tree"
        return f"{shape} + lookup" if "lookup" in source else shape

    def padded(self, rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of some rows, of all by default; T is the whole batch's."""
        columns = max(map(len, self.prompts))
        wanted = range(len(self.prompts)) if rows is None else rows
        ids = torch.full((len(wanted), columns), self.pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(wanted):
            length = len(self.prompts[row])
            columns_of_row = slice(columns - length, None) if self.sides[row] == "l" else slice(0, length)
            ids[place, columns_of_row] = torch.tensor(self.prompts[row])
            mask[place, columns_of_row] = 1
        return ids, mask

    def request(self) -> dict[str, Any]:
        """What transformers' own `generate` can be asked too, drawing apart."""
        request: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.pad}
        if self.eos:
            request["eos_token_id"] = list(self.eos)
        if self.stop_strings:
            request |= {"stop_strings": list(self.stop_strings), "tokenizer": letters_tokenizer(self.model.vocabulary)}
        for name, value in self.processors.items():
            if name == "odd or even":
                request["logits_processor"] = LogitsProcessorList([OddOrEven()])
            elif name == "prefix_allowed_tokens_fn":
                request[name] = Steps(self.model.vocabulary, value)
            elif name == "bad_words_ids":
                request[name] = [list(word) for word in value]
            else:
                request[name] = value
        return request

    def drawing(self, seeds: int | list[int] | None = None) -> dict[str, Any]:
        """How tokens are drawn."""
        if self.kind == "greedy":
            return {"do_sample": False}
        own = list(self.seeds) if isinstance(self.seeds, tuple) else self.seeds
        drawing = {"do_sample": True, "seed": own if seeds is None else seeds, **self.sampling}
        return drawing | ({"num_return_sequences": self.samples} if self.samples > 1 else {})

    def to_json(self) -> dict[str, Any]:
        """Everything, for a person who looks at a failing case."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}
        return plain | {"model": self.model.to_json()}


class OddOrEven(LogitsProcessor):  # type: ignore[misc]
    """Holds tokens of the other parity down, by the parity of all ids so far."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]."""
        parity_B1 = (input_ids.sum(dim=1) % 2)[:, None]
        return torch.where(torch.arange(scores.shape[1]) % 2 == parity_B1, scores, scores - 3.0)


@dataclass(frozen=True)
class Steps:
    """A constraint: after token t come tokens whose distance from t is a multiple of a step."""

    vocabulary: int
    step: int

    def __call__(self, batch_id: int, ids_T: Tensor) -> list[int]:
        """Allowed tokens, always some."""
        return [token for token in range(self.vocabulary) if (token - int(ids_T[-1])) % self.step == 0]


def draw_case(number: int, *, seed: int, models: int) -> Case:
    """Case `number` of the run with a seed and so many models."""
    rng = random.Random(f"case {seed} {number}")
    spec = rng.choice(model_specs(models, seed))
    kind: Kind = rng.choices(("greedy", "sampled", "drawn", "drawn, one token"), (55, 30, 9, 6))[0]
    rows = rng.choice([1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8])
    samples = rng.choice([2, 3]) if kind != "greedy" and rows <= 2 and rng.random() < 0.3 else 1
    longest = rng.choice([3, 8, 12, 12, 30])
    letters = rng.sample(range(spec.vocabulary), rng.choice([2, 4, spec.vocabulary]))
    prompts = tuple(tuple(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(rows))
    limit = rng.choice([1, 2, 3, 4, 6, 8, 10, 14])
    chosen: dict[str, Any] = {"pad": rng.randrange(spec.vocabulary)}
    if rng.random() < 0.45:
        chosen["eos"] = tuple(rng.sample(range(spec.vocabulary), rng.choice([1, 1, 2, 3])))
    if rng.random() < 0.12:
        chosen["stop_strings"] = tuple(
            "".join(rng.choices(LETTERS[: spec.vocabulary], k=rng.choice([1, 1, 2]))) for _ in range(rng.randint(1, 3))
        )
    if rng.random() < 0.35:
        chosen["processors"] = _processors(rng, spec, limit, with_end="eos" in chosen)
    if kind != "greedy":
        per_row = rng.random() < 0.5
        chosen["seeds"] = tuple(rng.randrange(1000) for _ in range(rows * samples)) if per_row else rng.randrange(1000)
        chosen["sampling"] = {"top_k": 1} if kind == "drawn, one token" else _sampling(rng)
    chosen["drafts"] = _drafts(rng, spec, kind)
    if not kind.startswith("drawn") and rng.random() < 0.65:
        chosen["spoilt"] = rng.choice([0.4, 0.7, 0.9, 1.0])
    if spec.lean and rng.random() < 0.5:
        chosen["executor"] = "lean"
    if rng.random() < 0.25:
        chosen["chunk"] = rng.choice([1, 2, 5, 16, None])
    if rng.random() < 0.3 or kind == "drawn":
        per_row = isinstance(chosen.get("seeds"), tuple)
        chosen["alone"] = rng.randrange(rows) if kind == "greedy" or (per_row and samples == 1) else 0
    return Case(
        number=number,
        model=spec,
        kind=kind,
        prompts=prompts,
        sides="".join(rng.choices("lr", k=rows)),
        max_new_tokens=limit,
        samples=samples,
        **chosen,
    )


def _sampling(rng: random.Random) -> dict[str, Any]:
    # transformers' own default is top_k=50: 0 switches it off.
    sampling: dict[str, Any] = {"temperature": rng.choice([0.3, 0.7, 1.0, 1.5]), "top_k": rng.choice([0, 0, 3, 8])}
    if rng.random() < 0.4:
        sampling["top_p"] = rng.choice([0.5, 0.8, 0.95])
    if rng.random() < 0.25:
        sampling["min_p"] = rng.choice([0.02, 0.1, 0.3])
    return sampling


def _processors(rng: random.Random, spec: ModelSpec, limit: int, *, with_end: bool) -> dict[str, Any]:
    tokens = range(spec.vocabulary)
    known: dict[str, Any] = {
        "repetition_penalty": rng.choice([1.2, 1.7, 0.8]),
        "no_repeat_ngram_size": rng.choice([1, 2, 3]) if limit < spec.vocabulary // 2 else 2,
        "encoder_repetition_penalty": 1.5,
        "bad_words_ids": [rng.sample(tokens, 1), rng.sample(tokens, 2)],
        "suppress_tokens": rng.sample(tokens, 2),
        "begin_suppress_tokens": rng.sample(tokens, 2),
        "prefix_allowed_tokens_fn": rng.choice([2, 3]),
        "odd or even": True,
    }
    if with_end:
        known |= {"min_new_tokens": rng.randint(1, limit), "min_length": rng.randint(1, limit + 8)}
        known["forced_eos_token_id"] = rng.randrange(spec.vocabulary)
    names = rng.sample(sorted(known), rng.choice([1, 1, 2, 3]))
    if "no_repeat_ngram_size" in names and "prefix_allowed_tokens_fn" in names:
        names.remove("no_repeat_ngram_size")  # together they may leave no token at all
    forced = "forced_eos_token_id" in names and "suppress_tokens" in names
    if forced and known["forced_eos_token_id"] in known["suppress_tokens"]:
        names.remove("suppress_tokens")  # transformers refuses to force what is suppressed
    return {name: known[name] for name in names}


def _drafts(rng: random.Random, spec: ModelSpec, kind: Kind) -> dict[str, Any]:
    heads = spec.num_future_tokens - 1
    if kind.startswith("drawn"):
        drafts: dict[str, Any] = {"sample_drafts": True}
        if rng.random() < 0.3:
            drafts["acceptance"] = "tokenwise"
        return drafts | _shape(rng, heads, trees=0.4)
    source = rng.choices(("heads", "lookup", "heads+lookup", "auto"), (60, 13, 15, 12))[0]
    copied = {"drafts": source, "num_lookup_tokens": rng.randint(1, 7), "lookup_ngram": rng.randint(1, 4)}
    if source == "lookup":
        return copied
    if source == "auto":
        return {"num_draft_tokens": "auto"} | ({"tree": _tree(rng, heads)} if rng.random() < 0.4 else {})
    return (copied if source == "heads+lookup" else {}) | _shape(rng, heads, trees=0.55)


def _shape(rng: random.Random, heads: int, *, trees: float) -> dict[str, Any]:
    if rng.random() >= trees:
        return {"num_draft_tokens": rng.randint(1, heads)} if rng.random() < 0.6 else {}
    return {"tree": _tree(rng, heads)}


def _tree(rng: random.Random, heads: int) -> int | str | list[tuple[int, ...]]:
    if rng.random() < 0.15:
        return "dynamic"
    if rng.random() < 0.3:
        return rng.randint(1, 20)
    if rng.random() < 0.5:
        grown = default_tree(heads, nodes=rng.randint(1, 14)).choices
        kept = [path for path in grown if rng.random() < 0.8] or [(0,)]
    else:  # shapes that nobody would grow
        kept = [tuple(rng.randrange(4) for _ in range(rng.randint(1, heads))) for _ in range(rng.randint(1, 6))]
    whole = {path[:length] for path in kept for length in range(1, len(path) + 1)}
    return list(Tree.from_choices(sorted(whole)).choices)
