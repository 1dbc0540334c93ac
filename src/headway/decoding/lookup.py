"""Drafts copied from the text: what followed its last tokens the last time.

Source: Saxena 2023, prompt lookup decoding; Yang et al. 2023, inference with reference (arXiv:2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence


class TextIndex:
    """One row's text, and where each of its n-grams stood last.

    >>> index = TextIndex([5, 6, 7, 8, 5, 6], longest=3)
    >>> index.continuation(3), index.continuation(6)
    ([7, 8, 5], [7, 8, 5, 6, 7, 8])
    >>> index.extend([9])
    >>> index.continuation(3)
    []
    """

    def __init__(self, tokens: Sequence[int], *, longest: int) -> None:
        """Index a text.

        Args:
            tokens: the text so far.
            longest: most tokens of an n-gram.
        """
        self._longest = longest
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; a constant number of steps for each."""
        for token in tokens:
            end = len(self._tokens)
            # Entered when a token follows, so that the end of the text never finds itself.
            for length in range(1, min(self._longest, end) + 1):
                self._after[tuple(self._tokens[end - length : end])] = end
            self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """`count` tokens that followed the longest n-gram at the end; empty where none of its ends stood before.

        A copy that reaches the end of the text goes on with itself, so a text that repeats is continued as it repeats.
        """
        end = len(self._tokens)
        for length in range(min(self._longest, end), 0, -1):
            begin = self._after.get(tuple(self._tokens[end - length :]))
            if begin is not None:
                period = end - begin
                return [self._tokens[begin + place % period] for place in range(count)]
        return []
