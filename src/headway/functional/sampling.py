"""Drawing tokens: reproducible numbers, inverse distribution functions, residuals.

Legend: V vocabulary.

Probabilities are float64 and a draw is a function of a uniform number, so that who draws what can be told from a key
and from nothing else: neither the state of a generator nor the other rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

_TOKEN, _ACCEPT, _DRAFT = range(3)


def keyed_uniform(*key: int) -> float:
    """A number in [0, 1) that looks random and depends on the key alone; 53 bits, the same on every machine.

    >>> keyed_uniform(1, 0, 5) == keyed_uniform(1, 0, 5), keyed_uniform(1, 0, 5) == keyed_uniform(1, 5, 0)
    (True, False)
    """
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def inverse_cdf(probs_V: Tensor, uniform: float) -> int:
    """The token in whose share of [0, 1) the uniform number lies; shares are in the order of the token ids.

    >>> [inverse_cdf(torch.tensor([0.25, 0.0, 0.75]), number) for number in (0.0, 0.2, 0.25, 0.999)]
    [0, 0, 2, 2]

    Args:
        probs_V: weights, which need not sum to 1; a token of weight 0 is never drawn.
        uniform: in [0, 1).

    Raises:
        ValueError: no positive weight, or one that is not finite.
    """
    cumulative_V = probs_V.double().cumsum(dim=-1)
    total = cumulative_V[-1]
    if not bool(total > 0) or not bool(total.isfinite()):
        raise ValueError(f"cannot draw a token: the weights sum to {float(total)}; logits must be finite somewhere")
    # Rounding may put the product on the total itself, beyond every share.
    places = torch.stack((uniform * total, total))
    after, last = torch.searchsorted(cumulative_V, places, right=True)[0], torch.searchsorted(cumulative_V, total)
    return int(torch.minimum(after, last))


def residual(target_V: Tensor, draft_V: Tensor, *, weight: float = 1.0) -> Tensor:
    """What is left of the target after the draft's share: norm(max(weight x p - q, 0)); p itself where nothing is left.

    >>> residual(torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
    tensor([0., 1.])

    Source: Leviathan et al. 2023 (arXiv:2211.17192), section 2.3; with a weight: Sun et al. 2024 (arXiv:2403.10444).
    """
    left_V = (weight * target_V - draft_V).clamp(min=0)
    total = left_V.sum()
    # Nothing left means p = q up to rounding, where a rejection has no probability either.
    return left_V / total if bool(total > 0) else target_V


def without_token(probs_V: Tensor, token: int) -> Tensor:
    """The distribution of a draw that is known not to give `token`; all 0 where it could give nothing else."""
    left_V = probs_V.clone()
    left_V[token] = 0
    total = left_V.sum()
    return left_V / total if bool(total > 0) else left_V


class Draws(Protocol):
    """Where acceptance rules get their randomness."""

    def token(self, probs_V: Tensor, depth: int) -> int:
        """Draw the text's own next token, after `depth` accepted ones."""

    def accept(self, probability: float, place: int) -> bool:
        """True with a probability; `place` tells the decisions of one block apart."""


@dataclass(frozen=True, slots=True)
class KeyedDraws:
    """Draws of one row's block, each a function of (seed, row, position).

    The text's own token at a position is drawn with a number that depends on the position alone. Every other decision
    also depends on where its block begins: the same position may be drafted by several blocks, and a block that looked
    at a draft before it decided (block verification) has used that number up.

    Attributes:
        seed: any whole number.
        row: which stream of the seed.
        made: new tokens of the row before this block.
    """

    seed: int
    row: int
    made: int

    def uniform(self, depth: int) -> float:
        """The number in [0, 1) that decides about the text's own token after `depth` accepted ones."""
        return keyed_uniform(self.seed, self.row, _TOKEN, self.made + depth)

    def token(self, probs_V: Tensor, depth: int) -> int:
        """See `Draws.token`."""
        return inverse_cdf(probs_V, self.uniform(depth))

    def accept(self, probability: float, place: int) -> bool:
        """See `Draws.accept`."""
        return keyed_uniform(self.seed, self.row, _ACCEPT, self.made, place) < probability

    def draft(self, probs_V: Tensor, place: int) -> int:
        """Draw the drafted token of one node."""
        return inverse_cdf(probs_V, keyed_uniform(self.seed, self.row, _DRAFT, self.made, place))
