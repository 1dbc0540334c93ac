"""From the data options of a configuration to encoded text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headway.data.cache_format import TokenCache
from headway.data.corpus import Corpus, prepare_corpus
from headway.data.mixture import Mixture
from headway.data.packing import Rows
from headway.data.whole_documents import PackedDocuments
from headway.errors import DataError
from headway.training.config import TrainConfig


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Encoded text.

    Attributes:
        corpus: what is trained on and what is held out.
        tokenizer: a Hugging Face tokenizer.
    """

    corpus: Corpus
    tokenizer: Any

    @property
    def train(self) -> TokenCache:
        """What is trained on, where it is one cache.

        Raises:
            DataError: it is a mixture of several.
        """
        if len(self.corpus.parts) > 1:
            raise DataError("a mixture is no single token cache: got one; read corpus.parts, or train without weights")
        return self.corpus.parts[0].cache

    @property
    def held_out(self) -> TokenCache | None:
        """What is only evaluated on; None where nothing is held out."""
        return self.corpus.held_out

    @property
    def fingerprint(self) -> str:
        """Changes when the training tokens do, or the shares in which they are mixed."""
        return self.corpus.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """Changes when any text could be encoded otherwise."""
        return self.corpus.tokenizer_fingerprint

    def rows(self, *, sequence_length: int, seed: int) -> Rows:
        """The rows of an epoch and their order."""
        return self.corpus.rows(sequence_length=sequence_length, seed=seed)


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
        ConfigError: a source with an option that cannot work.
    """
    return TrainingData(prepare_corpus(config.corpus_spec, tokenizer, directory, notice=notice), tokenizer)


def with_steps(config: TrainConfig, rows: Rows, *, rows_per_step: int | None = None) -> TrainConfig:
    """The configuration with the steps that its epochs come to, where it has epochs.

    The last step may reach a little into the next epoch: every epoch asked for is complete.

    Args:
        config: of the run.
        rows: of one epoch.
        rows_per_step: of all processes together; None for one process.

    Raises:
        ConfigError: a warm-up as long as the run.
    """
    if config.epochs is None:
        return config
    # rounded first: 0.1 of 50 rows are 5, not a hair more
    wanted = math.ceil(round(config.epochs * len(rows), 6) / (rows_per_step or config.rows_per_step))
    return replace(config, steps=max(wanted, 1), epochs=None)


def describe_passes(config: TrainConfig, rows: Rows, *, rows_per_step: int | None = None) -> str:
    """One line for a person: how often the run goes through its text; `rows_per_step` as in `with_steps`."""
    per_step = rows_per_step or config.rows_per_step
    samples = config.steps * per_step
    if isinstance(rows, Mixture):
        return f"{config.steps} steps of {per_step} rows: {rows.describe(samples)}"
    shortened = ""
    if isinstance(rows, PackedDocuments) and rows.num_shortened:
        shortened = f"; {rows.num_shortened} examples are longer than sequence_length={config.sequence_length} and cut"
    return f"{config.steps} steps of {per_step} rows: {samples / len(rows):.3g} epochs of {len(rows)} rows{shortened}"
