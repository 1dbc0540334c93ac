"""From the data options of a configuration to encoded text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.cache_format import TokenCache
from headway.data.corpus import Corpus, CorpusSpec, prepare_corpus
from headway.data.packing import Rows
from headway.data.source_spec import parse_source
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
    spec = CorpusSpec(
        sources=tuple(parse_source(line) for line in config.data),
        held_out_fraction=config.held_out_fraction,
        split_seed=config.split_seed,
        drop_near_duplicates=config.drop_near_duplicates,
        suffixes=config.suffixes,
    )
    return TrainingData(prepare_corpus(spec, tokenizer, directory, notice=notice), tokenizer)
