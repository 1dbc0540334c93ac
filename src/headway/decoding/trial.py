"""Drafts that are compared with the text that follows instead of being verified.

Verifying a draft makes a forward wider, by as many positions as it has in every row, and leaves the rows of a batch at different
positions. To learn whether drafts would be right none of that is needed: they are made, plain decoding goes on, and what it
emits is what they should have been. That costs the heads alone. It is exact because nothing depends on such a draft but later
decisions, which see it only together with tokens that the model has emitted.
"""

from __future__ import annotations

from collections.abc import Sequence

from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree


class Trial:
    """One draft of every row, on its way along the text that follows it.

    Attributes:
        depth: tokens of the text that it was compared with.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        tree: Tree | RowTrees | None,
        *,
        absent: Sequence[frozenset[int]] | None = None,
        live: Sequence[int],
    ) -> None:
        """Start below the root.

        Args:
            tokens: per row the last known token, and its draft.
            tree: of the draft, of all rows or of each; None for a chain.
            absent: per row the nodes that hold a filler; None where there is none.
            live: rows that go on.
        """
        self._tokens = tokens
        self._tree = Tree.chain(len(tokens[0]) - 1) if tree is None else tree
        self._absent = absent
        self._found: dict[int, list[int]] = {row: [0] for row in live}
        self.depth = 0

    @property
    def over(self) -> bool:
        """Whether nothing is left to compare."""
        return not self._found or self.depth == self._tree.depth

    def compare(self, emitted: Sequence[int | None]) -> tuple[int, int]:
        """One more token of every row.

        >>> trial = Trial([[5, 6, 7], [5, 8, 9]], None, live=[0, 1])
        >>> trial.compare([6, 7]), trial.compare([7, 7]), trial.over
        ((2, 1), (1, 1), True)

        Args:
            emitted: per row the token that it got; None for a row that has ended.

        Returns:
            The rows whose draft was right so far, and those of them where it still is.
        """
        self.depth += 1
        tried = 0
        still: dict[int, list[int]] = {}
        for row, nodes in self._found.items():
            token = emitted[row]
            if token is None:
                continue
            tried += 1
            absent = self._absent[row] if self._absent else frozenset()
            own, children = self._tokens[row], self._tree.of_row(row).children
            below = [child for node in nodes for child in children[node] if own[child] == token and child not in absent]
            if below:
                still[row] = below
        self._found = still
        return tried, len(still)
