"""The exact output law of a program that draws: every outcome of every draw, with its probability."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headway.functional.acceptance import Draft, Rule
from headway.functional.tree import Tree

VOCABULARY = 3


class _UndecidedError(Exception):
    def __init__(self, weights: list[float]) -> None:
        self.weights = weights


class ScriptedDraws:
    """Draws whose outcomes are given; the first one beyond the script is asked for."""

    def __init__(self, script: tuple[int, ...]) -> None:
        self._script = iter(script)
        self.probability = 1.0

    def _next(self, weights: list[float]) -> int:
        outcome = next(self._script, None)
        if outcome is None:
            raise _UndecidedError(weights)
        self.probability *= weights[outcome]
        return outcome

    def token(self, probs_V: Tensor, depth: int) -> int:
        return self._next((probs_V / probs_V.sum()).tolist())

    def draft(self, probs_V: Tensor, place: int) -> int:
        return self.token(probs_V, place)

    def accept(self, probability: float, place: int) -> bool:
        assert -1e-12 <= probability <= 1 + 1e-12
        return bool(self._next([1 - probability, probability]))


def law_of(program: Callable[[ScriptedDraws], Hashable]) -> dict[Hashable, float]:
    """Outcome -> probability."""
    law: dict[Hashable, float] = defaultdict(float)
    open_scripts: list[tuple[int, ...]] = [()]
    while open_scripts:
        script = open_scripts.pop()
        draws = ScriptedDraws(script)
        try:
            outcome = program(draws)
        except _UndecidedError as choice:
            open_scripts += [(*script, index) for index, weight in enumerate(choice.weights) if weight > 0]
            continue
        law[outcome] += draws.probability
    return dict(law)


def random_probs(generator: torch.Generator, *, zeros: float = 0.0, vocabulary: int = VOCABULARY) -> Tensor:
    """A random distribution, some tokens of which may be impossible."""
    weights_V = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 2 + 1e-3
    impossible_V = torch.rand(vocabulary, generator=generator) < zeros
    impossible_V[int(torch.randint(vocabulary, (1,), generator=generator))] = False
    weights_V[impossible_V] = 0
    return weights_V / weights_V.sum()


@dataclass
class Language:
    """Random next-token distributions per prefix: a model p and its drafter q, as near to p as asked."""

    seed: int
    zeros: float = 0.0
    nearness: float = 0.0
    vocabulary: int = VOCABULARY
    _known: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def _probs(self, kind: str, prefix: tuple[int, ...]) -> Tensor:
        if (kind, prefix) not in self._known:
            code = sum((token + 1) * 7**place for place, token in enumerate(prefix)) + (1_000_003 if kind == "q" else 0)
            generator = torch.Generator().manual_seed(self.seed * 10_007 + code)
            self._known[kind, prefix] = random_probs(generator, zeros=self.zeros, vocabulary=self.vocabulary)
        return self._known[kind, prefix]

    def target(self, prefix: Sequence[int]) -> Tensor:
        return self._probs("p", tuple(prefix))

    def drafter(self, prefix: Sequence[int]) -> Tensor:
        return self.nearness * self.target(prefix) + (1 - self.nearness) * self._probs("q", tuple(prefix))

    def law(self, length: int) -> dict[tuple[int, ...], float]:
        """Of the first `length` tokens of a text by p."""
        law = {}
        for text in itertools.product(range(self.vocabulary), repeat=length):
            probability = 1.0
            for place, token in enumerate(text):
                probability *= float(self.target(text[:place])[token])
            law[text] = probability
        return law


def draw_draft(tree: Tree, drafter: Callable[[Sequence[int]], Tensor], draws: ScriptedDraws) -> tuple:
    """Tokens of a tree whose siblings are drawn without replacement, and what each node's children were drawn from."""
    tokens, probs = [0] + [-1] * (len(tree) - 1), {}
    for node in range(len(tree)):
        if node and tokens[node] < 0:
            continue
        if not tree.children[node]:
            continue
        left_V = probs[node] = drafter([tokens[above] for above in tree.path(node)])
        for child in tree.children[node]:
            if float(left_V.sum()) == 0:
                break
            tokens[child] = draws.draft(left_V / left_V.sum(), child)
            left_V = left_V.clone()
            left_V[tokens[child]] = 0
    return tokens, probs


def decide(rule: Rule, draft: Draft, language: Language, draws: ScriptedDraws) -> tuple[int, ...]:
    """The tokens that one block emits."""
    walk = rule(draft, draws)
    node = next(walk)
    while True:
        prefix = [draft.tokens[above] for above in draft.tree.path(node)]
        # A rule must not ask for predictions after tokens that the model gives no chance.
        for place, token in enumerate(prefix):
            assert language.target(prefix[:place])[token] > 0
        try:
            node = walk.send(language.target(prefix))
        except StopIteration as stop:
            verdict = stop.value
            accepted = [draft.tokens[place] for place in verdict.nodes]
            return (*accepted, *([] if verdict.token is None else [verdict.token]))


def completed(law: dict, language: Language, length: int) -> dict[tuple[int, ...], float]:
    """The law of the first `length` tokens where p goes on after what one block emitted."""
    full = dict.fromkeys(language.law(length), 0.0)
    for emitted, probability in law.items():
        for rest in itertools.product(range(language.vocabulary), repeat=max(0, length - len(emitted))):
            chance, text = probability, [*emitted[:length]]
            for token in rest:
                chance *= float(language.target(text)[token])
                text.append(token)
            full[tuple(text)] += chance
    return full


def total_variation(one: dict, other: dict) -> float:
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys()) / 2
