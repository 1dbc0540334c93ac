"""Held-out text: whole packages, chosen by hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headway.data.collection import Collection
from headway.data.document import Document
from headway.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Training and held-out documents, each in the order given; no group is in both."""

    train: Sequence[Document]
    held_out: Sequence[Document]

    @property
    def held_out_fraction(self) -> float:
        """Share of held-out bytes."""
        held_out = total_bytes(self.held_out)
        return held_out / (held_out + total_bytes(self.train))

    def describe(self) -> str:
        """One line for a person."""
        groups = len({document.group for document in self.held_out})
        return (
            f"{len(self.train)} documents to train on, {len(self.held_out)} held out "
            f"({groups} whole group{'' if groups == 1 else 's'}, {100 * self.held_out_fraction:.2f} % of the bytes)"
        )


def split_by_group(documents: Iterable[Document], *, held_out_fraction: float, seed: int) -> Split:
    """Hold out whole groups that together have nearly the asked fraction of the bytes.

    Groups are visited in the order of sha256(seed, group) and taken while they fit; then the smallest one left is taken
    too if that comes nearer, or if nothing fitted. So the held-out bytes miss the asked number by at most half a group
    (the smallest left to train on) unless every group is larger than asked, and neither side is ever empty. Above one
    half, the training side is chosen this way.

    Args:
        documents: a `Collection` stays on disk and is not read; others are held in memory.
        held_out_fraction: of the bytes, in (0, 1).
        seed: another seed, other groups.

    Raises:
        ConfigError: held_out_fraction outside (0, 1).
        DataError: fewer than two groups with text.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ConfigError(
            f"held_out_fraction must be above 0 and below 1: got {held_out_fraction}; pass for example 0.05"
        )
    documents = documents if isinstance(documents, Collection) else list(documents)
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += document.num_bytes
    sizes = +sizes  # a group without a byte can be no side's only one
    if len(sizes) < 2:
        only = f" ({next(iter(sizes))!r})" if sizes else ""
        raise DataError(
            f"held-out text is chosen by whole top-level folders or files, and needs two with text in them: got "
            f"{len(sizes)}{only}; name the held-out text explicitly (held_out: a file, a folder, ...), or name the "
            f"folder inside so that its parts count"
        )
    fraction = min(held_out_fraction, 1.0 - held_out_fraction)
    chosen = _choose(sizes, target=fraction * sizes.total(), seed=seed)
    if held_out_fraction > 0.5:
        chosen = sizes.keys() - chosen
    held_out = [document.group in chosen for document in documents]
    return Split(train=selected(documents, [not out for out in held_out]), held_out=selected(documents, held_out))


def selected(documents: Sequence[Document], keep: Sequence[bool]) -> Sequence[Document]:
    """The documents for which `keep` is true, in order; a `Collection` gives a collection, others a list."""
    if isinstance(documents, Collection):
        return documents.take(keep)
    return [document for document, wanted in zip(documents, keep, strict=True) if wanted]


def total_bytes(documents: Iterable[Document]) -> int:
    """Length of all documents together; nothing is read."""
    return sum(document.num_bytes for document in documents)


def _choose(sizes: Counter[str], *, target: float, seed: int) -> set[str]:
    """Groups of nearly `target` bytes; target is at most half of all bytes, so some group always stays behind."""
    order = sorted(sizes, key=lambda group: _hash(seed, group))
    chosen: set[str] = set()
    missing = target
    for group in order:
        if sizes[group] <= missing:
            chosen.add(group)
            missing -= sizes[group]
    left = [group for group in order if group not in chosen]
    smallest = min(left, key=lambda group: sizes[group])
    if not chosen or sizes[smallest] - missing < missing:
        chosen.add(smallest)
    return chosen


def _hash(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode(errors="surrogatepass")).digest()
