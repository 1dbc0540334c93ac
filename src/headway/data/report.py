"""What a source gave and what it left out, counted while it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from headway.data.document import is_utf8

LONG_LINE_BYTES = 1 << 20
"""A document with a line longer than this is counted as having a long line."""

NAMED_IN_REPORT = 3
"""So many names are spelled out in a line for a person."""


@dataclass
class SourceReport:
    """What a source gave and what it left out; filled in while its documents are read.

    Attributes:
        documents: given.
        num_bytes: given.
        empty: files or records without a byte, left out.
        repeated: files met before under another name (links) or in another source, left out.
        hidden: files and folders whose name starts with a dot, and `__pycache__`, left out unless named by the caller.
        other_suffix: files without one of the suffixes asked for, left out.
        special: devices, pipes, sockets and dangling links, left out.
        unreadable: (name, reason) of files and folders that the system would not read, left out (of a damaged
            compressed file: from the damage on).
        broken: lines that are not a JSON object, left out.
        too_long: lines of JSON above the limit of a record, left out.
        without_field: records that lack the field asked for, left out.
        not_text: records whose field holds something else than text, left out.
        without_reward: records whose reward is neither correct nor incorrect, left out.
        undecodable: given, with bytes that are not UTF-8.
        with_nul: given, with NUL bytes.
        long_lines: given, with a line above 1 MiB.
    """

    documents: int = 0
    num_bytes: int = 0
    empty: int = 0
    repeated: int = 0
    hidden: int = 0
    other_suffix: int = 0
    special: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    broken: int = 0
    too_long: int = 0
    without_field: int = 0
    not_text: int = 0
    without_reward: int = 0
    undecodable: int = 0
    with_nul: int = 0
    long_lines: int = 0

    def describe(self) -> str:
        """One line for a person.

        >>> SourceReport(documents=3, num_bytes=5_200_000, empty=1, with_nul=2).describe()
        '3 documents, 5.20 MB; left out: 1 empty; kept although: 2 with NUL bytes'
        """
        unreadable = ", ".join(f"{name!r} {reason}" for name, reason in self.unreadable[:NAMED_IN_REPORT])
        more = ", ..." if len(self.unreadable) > NAMED_IN_REPORT else ""
        left_out = {
            "empty": self.empty,
            "met before (links, or named twice)": self.repeated,
            "hidden": self.hidden,
            "of another suffix": self.other_suffix,
            "not regular files": self.special,
            f"unreadable ({unreadable}{more})": len(self.unreadable),
            "with broken JSON": self.broken,
            "too long for a record": self.too_long,
            "without the field": self.without_field,
            "without text in the field": self.not_text,
            "without a reward": self.without_reward,
        }
        kept = {
            "with undecodable bytes": self.undecodable,
            "with NUL bytes": self.with_nul,
            "with lines above 1 MiB": self.long_lines,
        }
        parts = [f"{self.documents} document{'' if self.documents == 1 else 's'}, {self.num_bytes / 1e6:.2f} MB"]
        for title, counts in (("left out", left_out), ("kept although", kept)):
            listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            if listed:
                parts.append(f"{title}: {listed}")
        return "; ".join(parts)

    def watch(self, pieces: Iterable[bytes], *, is_text: bool = True) -> Iterator[bytes]:
        """Pass on the pieces of one document, and count it (if it has a byte) when they are through."""
        num_bytes, undecodable, with_nul, long_line, line = 0, False, False, False, 0
        for piece in pieces:
            num_bytes += len(piece)
            if is_text:
                # the pieces of a document decode on their own, so the whole decodes iff each of them does
                undecodable = undecodable or not is_utf8(piece)
                with_nul = with_nul or b"\0" in piece
                line, longest = _line_lengths(piece, line)
                long_line = long_line or longest > LONG_LINE_BYTES
            yield piece
        if not num_bytes:
            self.empty += 1
            return
        self.documents += 1
        self.num_bytes += num_bytes
        self.undecodable += undecodable
        self.with_nul += with_nul
        self.long_lines += long_line


def _line_lengths(piece: bytes, begun: int) -> tuple[int, int]:
    """Length of the line that a piece leaves unfinished, and of the longest that it ends or leaves.

    Lines that begin and end in the piece are no longer than it, so they are not looked at.

    Args:
        piece: at most `LONG_LINE_BYTES`.
        begun: length of the line unfinished before it.
    """
    first = piece.find(b"\n")
    if first < 0:
        return begun + len(piece), begun + len(piece)
    left = len(piece) - piece.rfind(b"\n") - 1
    return left, max(begun + first, left)
