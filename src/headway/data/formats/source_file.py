"""What every format offers: a pass over its documents, and each of them again by its position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from headway.data.report import SourceReport


class Entry(NamedTuple):
    """A document met in a pass over its file.

    Attributes:
        position: finds it again: a byte, a row or a token of the file.
        number: of the record in its file, from 1; 0 where the file is one document.
        group: what a split must not tear apart; None leaves it to the content.
        prompt_bytes: how many of the first bytes are a prompt.
        pieces: the content, at most 1 MiB each; read once.
    """

    position: int
    number: int
    group: str | None
    prompt_bytes: int
    pieces: Iterable[bytes]


class SourceFile(ABC):
    """A file (or a data set) that holds documents; pickling it sends its name, not what it has open.

    Attributes:
        name: relative to its source.
    """

    name: str
    is_tokens = False

    @abstractmethod
    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """Documents in their order; what is left out is counted in the report.

        Raises:
            DataError: nothing in the file can be what was asked for.
        """

    @abstractmethod
    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The content of one document again, cheaply when positions ascend.

        Args:
            position: as its entry said.
            num_bytes: of its content.

        Raises:
            OSError: the file cannot be read any more.
            DataError: it holds something else now.
        """

    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """Changes when the content does, as far as that can be told without reading it (JSON-ready)."""

    def close(self) -> None:  # noqa: B027 - most formats hold nothing open
        """Let go of what is open; reading opens it again."""

    def __getstate__(self) -> dict[str, object]:
        self.close()
        return self.__dict__
