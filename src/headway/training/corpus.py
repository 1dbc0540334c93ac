"""From sources to token caches: read, split, drop near-duplicates, encode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.fingerprint import data_fingerprint, tokenizer_fingerprint
from headway.data.near_duplicates import drop_near_duplicates
from headway.data.sources import Document, SourceReport, iter_files, standard_library
from headway.data.split import split_by_group
from headway.data.token_cache import TokenCache, build_token_cache
from headway.errors import DataError
from headway.training.config import TrainConfig

STANDARD_LIBRARY = "stdlib"
"""The name in `TrainConfig.data` for the running interpreter's standard library."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Encoded text.

    Attributes:
        train: what is trained on.
        held_out: what is only evaluated on; None where nothing is held out.
        tokenizer: a Hugging Face tokenizer.
    """

    train: TokenCache
    held_out: TokenCache | None
    tokenizer: Any

    @property
    def tokenizer_fingerprint(self) -> str:
        """Changes when any text could be encoded otherwise."""
        return self.train.metadata.tokenizer_fingerprint


def prepare_data(
    config: TrainConfig, tokenizer: Any, directory: Path, *, notice: Callable[[str], None] = lambda text: None
) -> TrainingData:
    """Read the sources of a configuration and open (or build) their token caches.

    Args:
        config: names sources, split and whether near-duplicates of held-out text are dropped.
        tokenizer: encodes; has an EOS token.
        directory: of the caches; one that is there for the same text and tokenizer is used again.
        notice: told one sentence per finding: what was read, left out, held out, dropped.

    Raises:
        DataError: sources that cannot be read or hold no text, or too little of it to hold something out.
    """
    documents: Sequence[Document] = list(_documents(config, notice))
    held_out: Sequence[Document] = []
    if config.held_out_fraction > 0:
        split = split_by_group(documents, held_out_fraction=config.held_out_fraction, seed=config.split_seed)
        documents, held_out = split.train, split.held_out
        notice(split.describe())
        if config.drop_near_duplicates:
            report = drop_near_duplicates(documents, held_out)
            documents = report.kept
            if report.dropped:
                notice(report.describe())
    if not documents:
        raise DataError("no document is left to train on: all are near-duplicates of held-out text; add text")
    return TrainingData(
        train=_cache(documents, tokenizer, directory),
        held_out=_cache(held_out, tokenizer, directory) if held_out else None,
        tokenizer=tokenizer,
    )


def _documents(config: TrainConfig, notice: Callable[[str], None]) -> Iterator[Document]:
    """Documents of all sources; names of the standard library get a prefix where other sources could share them."""
    paths = [path for path in config.data if path != STANDARD_LIBRARY]
    if STANDARD_LIBRARY in config.data:
        report = SourceReport()
        for document in standard_library(report=report):
            if paths:
                prefix = f"{STANDARD_LIBRARY}:"
                document = Document(prefix + document.name, prefix + document.group, document.data)
            yield document
        notice(f"{STANDARD_LIBRARY}: {report.describe()}")
    if paths:
        report = SourceReport()
        yield from iter_files(paths, suffixes=config.suffixes, report=report)
        notice(f"{', '.join(paths)}: {report.describe()}")


def _cache(documents: Sequence[Document], tokenizer: Any, directory: Path) -> TokenCache:
    key = hashlib.sha256(f"{data_fingerprint(documents)}{tokenizer_fingerprint(tokenizer)}".encode()).hexdigest()
    return build_token_cache(documents, tokenizer, directory / key[:16])
