"""Which drafted tokens stand: acceptance rules.

Legend: B rows, K drafted tokens of a chain, M = K + 1 positions of a block (the last known token and the draft), V
vocabulary.

`accept_greedy_chain` decides about a whole batch at once and needs nothing but tokens. All other rules have one interface
(`Rule`): they decide about one row, ask for the model's predictions node by node, and get their randomness from outside
(`Draws`), so they are pure functions whose output law can be enumerated. Rules are lossless unless they say LOSSY.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.functional.sampling import Draws, residual, without_token
from headway.functional.tree import Tree


def accept_greedy_chain(draft_BK: Tensor, target_BM: Tensor) -> Tensor:
    """Number of drafted tokens, from the front, that greedy decoding would have chosen itself.

    Equal to: feed the tokens one by one and count until the first that differs from the model's own choice. A row then
    emits `accepted + 1` tokens, `target_BM[row, : accepted + 1]`: each accepted draft equals the target at its place,
    and the target after the last accepted one is the model's own next token. Draft tokens after the first wrong one
    never count, even where they happen to agree.

    >>> import torch
    >>> draft = torch.tensor([[5, 6, 7], [5, 9, 7], [9, 6, 7]])
    >>> target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    >>> accept_greedy_chain(draft, target)
    tensor([3, 1, 0])

    Args:
        draft_BK: proposed tokens; item j is the proposal for the token that `target_BM[:, j]` decides.
        target_BM: the model's own choice after the last known token (item 0) and after each draft token.

    Returns:
        int64 [B], each 0..K.

    Raises:
        ValueError: shapes that do not belong together.

    Source: Stern et al. 2018 (arXiv:1811.03115), section 3, "verify" and "accept"; Gloeckle et al. 2024
    (arXiv:2404.19737), section 3.2, uses it with the model's own extra heads.
    """
    if draft_BK.ndim != 2 or target_BM.shape != (draft_BK.shape[0], draft_BK.shape[1] + 1):
        raise ValueError(
            f"a chain of K drafted tokens needs K + 1 targets per row: got draft {tuple(draft_BK.shape)} and target "
            f"{tuple(target_BM.shape)}; pass the target after the last known token and after every drafted one"
        )
    return (draft_BK == target_BM[:, :-1]).cumprod(dim=1).sum(dim=1)


ROOT = 0


@dataclass(frozen=True)
class Draft:
    """What one row's block holds after its last known token.

    Attributes:
        tree: shape.
        tokens: per node its token; the root's is the last known one; -1 where a node has none (a distribution that has
            fewer tokens than the node has siblings).
        depth: deeper nodes do not count.
        room: tokens the row may still get: an accepted node at this depth is its last token.
        ends: token ids that end the text.
        draft_probs: per node with children the distribution q [V] from which they were drawn, one after the other
            without replacement; None where tokens are a function of the text before them, a point mass each.
    """

    tree: Tree
    tokens: Sequence[int]
    depth: int
    room: int
    ends: frozenset[int] = frozenset()
    draft_probs: Mapping[int, Tensor] | None = None

    def children(self, node: int) -> list[int]:
        """The candidates for the token after a node."""
        if self.tree.depths[node] >= self.depth:
            return []
        return [child for child in self.tree.children[node] if self.tokens[child] >= 0]

    def is_last(self, node: int) -> bool:
        """Whether the text ends with this node, if it is accepted."""
        return node != ROOT and (self.tokens[node] in self.ends or self.tree.depths[node] >= self.room)

    def verdict(self, node: int, token: int | None) -> Verdict:
        """Everything down to a node stands, and then comes a token."""
        return Verdict(self.tree.path(node), token)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands of a draft.

    Attributes:
        nodes: the accepted nodes, from below the root downwards.
        token: the model's own token after them; None where the last accepted one ends the text.
    """

    nodes: tuple[int, ...]
    token: int | None


Walk = Generator[int, Tensor, Verdict]
"""A rule at work: it yields a node, is sent the model's own prediction [V] for the token after it, and returns a verdict.

At temperature 0 the prediction is any score whose largest entry is the model's choice; above it, it is the distribution
p in float64, after temperature, top-p and all other processors. A rule asks for a node only where everything above the
node could stand, so predictions after impossible tokens are never needed."""

Rule = Callable[[Draft, Draws], Walk]
"""An acceptance rule: what all of them look like to the loop."""


def greedy_match(draft: Draft, draws: Draws) -> Walk:
    """Follow the model's most likely token through the tree. Lossless: equal to greedy decoding.

    Source: Stern et al. 2018 (arXiv:1811.03115), section 3.
    """
    return _match(draft, lambda target_V, depth: int(target_V.argmax()))


def sample_and_match(draft: Draft, draws: Draws) -> Walk:
    """Draw the model's own token at every node and follow it through the tree. Lossless for point-mass drafts.

    Every emitted token is a draw from p whatever the draft was, so drafts may come from anywhere as long as they do not
    depend on numbers that these draws use. Candidates may occur twice.

    Source: the rule of `evaluate_posterior` in EAGLE's code, in its simpler form; the acceptance probability of a node
    is the sum of p over its children.
    """
    return _match(draft, draws.token)


def _match(draft: Draft, choose: Callable[[Tensor, int], int]) -> Walk:
    # All nodes whose paths hold the same tokens, since a copied text may repeat what a head proposes.
    found, depth = [ROOT], 0
    while True:
        token = choose((yield found[0]), depth)
        below = [child for node in found for child in draft.children(node) if draft.tokens[child] == token]
        if not below:
            return draft.verdict(found[0], token)
        if draft.is_last(below[0]):
            return draft.verdict(below[0], None)
        found, depth = below, depth + 1


def speculative_sampling(draft: Draft, draws: Draws) -> Walk:
    """Accept a drawn candidate with probability min(1, p/q), else try its next sibling on what is left. Lossless.

    After a rejection p becomes norm(max(p - q, 0)), and q loses the rejected token, since siblings are drawn without
    replacement. On a chain this is speculative sampling.

    Source: Leviathan et al. 2023 (arXiv:2211.17192), Algorithm 1; without replacement: Jeon et al. 2024
    (arXiv:2402.14160), Chen et al. 2024, Sequoia (arXiv:2402.12374).
    """
    node = ROOT
    while True:
        target_V = yield node
        accepted = None
        children = draft.children(node)
        draft_V = _drawn_from(draft, node) if children else None
        for child in children:
            assert draft_V is not None
            token = draft.tokens[child]
            if draws.accept(min(1.0, float(target_V[token] / draft_V[token])), child):
                accepted = child
                break
            target_V = residual(target_V, draft_V)
            draft_V = without_token(draft_V, token)
        if accepted is None:
            return draft.verdict(node, draws.token(target_V, draft.tree.depths[node]))
        if draft.is_last(accepted):
            return draft.verdict(accepted, None)
        node = accepted


def block_verification(draft: Draft, draws: Draws) -> Walk:
    """Decide about a drawn chain as a whole. Lossless, and never accepts fewer tokens than token by token.

    With w_0 = 1 and w_i = min(w_{i-1} p(x_i)/q(x_i), 1), the prefix of i < K tokens passes with probability
    S_i / (S_i + 1 - w_i), S_i = sum max(w_i p - q, 0), the whole chain with w_K; the longest prefix that passes stands, and
    the next token is drawn from norm(max(w_i p - q, 0)), or from p after the whole chain.

    Source: Sun et al. 2024, block verification (arXiv:2403.10444).
    """
    node, weight = ROOT, 1.0
    passes: list[tuple[int, float, Tensor | None]] = []  # node, chance, what the next token is drawn from
    while True:
        if draft.is_last(node):
            passes.append((node, weight, None))
            break
        children = draft.children(node)
        target_V = yield node
        if not children:
            passes.append((node, weight, target_V))
            break
        (child,) = children
        draft_V, token = _drawn_from(draft, node), draft.tokens[child]
        left = float((weight * target_V - draft_V).clamp(min=0).sum())
        chance = 1.0 if node == ROOT else left / (left + 1 - weight) if left > 0 else float(weight >= 1)
        passes.append((node, chance, residual(target_V, draft_V, weight=weight)))
        weight = min(weight * float(target_V[token] / draft_V[token]), 1.0)
        node = child
        if weight == 0:
            break
    for stands, chance, next_V in reversed(passes):
        if stands == ROOT or draws.accept(chance, stands):
            token_after = None if next_V is None else draws.token(next_V, draft.tree.depths[stands])
            return draft.verdict(stands, token_after)
    raise AssertionError("the root always stands")


def _drawn_from(draft: Draft, node: int) -> Tensor:
    if draft.draft_probs is None:
        raise ValueError("this rule is for drawn drafts; pass the distributions (draft_probs), or match tokens")
    return draft.draft_probs[node]


# ------------------------------------------------------------------------------------------------------- lossy rules


@dataclass(frozen=True)
class TypicalAcceptance:
    """LOSSY: accept what the model finds likely enough, p(x) > min(epsilon, delta x exp(-H(p))), H in nats.

    At temperature 0 it is the exact match, as in the paper.

    Attributes:
        threshold: epsilon, `posterior_threshold` in Medusa's code.
        alpha: delta, `posterior_alpha`; the paper recommends sqrt(epsilon).

    Source: Cai et al. 2024, Medusa (arXiv:2401.10774), section 2.3.1.
    """

    threshold: float = 0.09
    alpha: float = 0.3

    def __call__(self, draft: Draft, draws: Draws) -> Walk:
        """See `Rule`; for temperatures above 0."""

        def accepts(target_V: Tensor, tokens: list[int], depth: int) -> list[bool]:
            entropy = float(-torch.xlogy(target_V, target_V).sum())
            limit = min(self.threshold, self.alpha * math.exp(-entropy))
            return [float(target_V[token]) > limit for token in tokens]

        return _longest_accepted(draft, draws, accepts, sampled=True)


@dataclass(frozen=True)
class TopKAcceptance:
    """LOSSY: accept what is among the model's k most likely tokens.

    Attributes:
        k: 1 is the exact match of greedy decoding.
        sampled: whether predictions are distributions, and the model's own token is drawn.

    Source: Stern et al. 2018 (arXiv:1811.03115), section 5.1.
    """

    k: int
    sampled: bool

    def __call__(self, draft: Draft, draws: Draws) -> Walk:
        """See `Rule`."""

        def accepts(target_V: Tensor, tokens: list[int], depth: int) -> list[bool]:
            best = target_V.topk(min(self.k, target_V.shape[0]))
            possible = best.values > (0 if self.sampled else -math.inf)
            allowed = set(best.indices[possible].tolist())
            return [token in allowed for token in tokens]

        return _longest_accepted(draft, draws, accepts, sampled=self.sampled)


@dataclass(frozen=True)
class DistanceAcceptance:
    """LOSSY: accept a token id at most so far from the model's own choice, for vocabularies of ordered values.

    The model's own choice is its most likely token, or the one that is drawn where decoding samples.

    Attributes:
        limit: 0 is the exact match.
        sampled: whether predictions are distributions, and the model's own token is drawn.

    Source: Stern et al. 2018 (arXiv:1811.03115), section 5.2.
    """

    limit: int
    sampled: bool

    def __call__(self, draft: Draft, draws: Draws) -> Walk:
        """See `Rule`."""

        def accepts(target_V: Tensor, tokens: list[int], depth: int) -> list[bool]:
            own = _own_token(target_V, draws, depth, sampled=self.sampled)
            return [abs(token - own) <= self.limit for token in tokens]

        return _longest_accepted(draft, draws, accepts, sampled=self.sampled)


def _longest_accepted(
    draft: Draft, draws: Draws, accepts: Callable[[Tensor, list[int], int], list[bool]], *, sampled: bool
) -> Walk:
    """The longest path of accepted nodes, of equally long ones the likeliest; then the model's own token."""
    best, best_rank, best_target = ROOT, (0, 0.0), None
    open_nodes = [(ROOT, 0.0)]
    while open_nodes:
        node, log_prob = open_nodes.pop(0)
        target_V = None
        if not draft.is_last(node):
            target_V = yield node
        depth = draft.tree.depths[node]
        if (depth, log_prob) > best_rank or node == ROOT:
            best, best_rank, best_target = node, (depth, log_prob), target_V
        if target_V is None:
            continue
        children = draft.children(node)
        tokens = [draft.tokens[child] for child in children]
        if tokens:
            log_probs = (target_V.log() if sampled else target_V.log_softmax(dim=-1))[tokens].tolist()
            verdicts = zip(children, accepts(target_V, tokens, depth), log_probs, strict=True)
            open_nodes += [(child, log_prob + own) for child, good, own in verdicts if good]
    token = None
    if best_target is not None:
        token = _own_token(best_target, draws, draft.tree.depths[best], sampled=sampled)
    return draft.verdict(best, token)


def _own_token(target_V: Tensor, draws: Draws, depth: int, *, sampled: bool) -> int:
    return draws.token(target_V, depth) if sampled else int(target_V.argmax())
