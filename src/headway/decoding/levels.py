"""What the heads say after drafted tokens, one depth of a draft after the other.

Legend: B rows, X nodes of one depth that go on (open nodes), K drafted tokens of the longest path, V vocabulary.

Heads that draft at once say the same after every node of a depth. With a Markov bias an offset's logits are those of its
head plus a row that depends on the node's own token; heads that read drafted tokens (Hydra, sequential) go through all
tokens of the node's path. One call scores all open nodes of a depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from headway.heads.base import DraftStep

FIRST_OFFSET = 2
"""What the children of a draft's root stand for; the root itself is the token that the model has just chosen."""


class Levels(Protocol):
    """A draft that is being made; called once per depth, from the root's on."""

    def __call__(self, tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
        """Logits for the children of the open nodes of the next depth.

        Args:
            tokens_BX: the open nodes' tokens; at first the last known token of each row.
            parents_BX: places of their parents among the open nodes of the call before; None where every depth has one.

        Returns:
            [B, X, V]; [B, 1, V] where they are the same for all nodes of the depth.
        """


class SharedLevels:
    """Of heads that draft at once, and of those with a Markov bias on top."""

    def __init__(
        self,
        logits_KBV: Tensor,
        *,
        bias: Callable[[Tensor], Tensor] | None = None,
        soft_cap: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Start a draft.

        Args:
            logits_KBV: of all offsets; with a bias those before it, without soft-capping.
            bias: tokens [B, X] -> what they add to the next token's logits [B, X, V].
            soft_cap: what the family does to the sum.
        """
        self._offsets = iter(logits_KBV)
        self._bias = bias
        self._soft_cap = soft_cap

    def __call__(self, tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
        """See `Levels`."""
        logits_B1V: Tensor = next(self._offsets)[:, None]
        if self._bias is None:
            return logits_B1V
        logits_BXV: Tensor = logits_B1V + self._bias(tokens_BX)
        if self._soft_cap is None:
            return logits_BXV
        return self._soft_cap(logits_BXV)


class SteppedLevels:
    """Of heads that read the drafted tokens."""

    def __init__(self, step: DraftStep, logits: Callable[[Tensor, int, Tensor], Tensor]) -> None:
        """Start a draft.

        Args:
            step: see `Heads.begin_draft`.
            logits: (hidden states [B, X, D], offset, tokens before it [B, X]) -> [B, X, V].
        """
        self._step = step
        self._logits = logits
        self._offset = FIRST_OFFSET

    def __call__(self, tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
        """See `Levels`."""
        offset, self._offset = self._offset, self._offset + 1
        return self._logits(self._step(offset, tokens_BX, parents_BX), offset, tokens_BX)
