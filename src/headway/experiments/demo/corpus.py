"""The demo's text: the running interpreter's standard library, whole packages held out."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headway.data.fingerprint import data_fingerprint
from headway.data.near_duplicates import DeduplicationReport, drop_near_duplicates
from headway.data.sources import Document, standard_library
from headway.data.split import Split, split_by_group
from headway.data.token_cache import TokenCache
from headway.errors import DataError
from headway.experiments.demo.generation import DemoPrompt
from headway.experiments.demo.result import CorpusSummary
from headway.training.config import TrainConfig

_DEFINITION = re.compile(rb"^ {0,4}def ", re.MULTILINE)


@dataclass(frozen=True)
class DemoCorpus:
    """The documents behind the token caches of a training run.

    Attributes:
        train: trained on, near-duplicates of held-out text dropped.
        held_out: evaluated and prompted with.
        summary: for the report.
    """

    train: Sequence[Document]
    held_out: Sequence[Document]
    summary: CorpusSummary


def read_corpus(config: TrainConfig) -> DemoCorpus:
    """The split that `headway.training.loop.train` makes of the same configuration, with names instead of tokens.

    `check_same_text` proves that it is the same.

    Raises:
        DataError: this interpreter has no library source on disk.
    """
    split: Split = split_by_group(
        standard_library(), held_out_fraction=config.held_out_fraction, seed=config.split_seed
    )
    report = (
        drop_near_duplicates(split.train, split.held_out)
        if config.drop_near_duplicates
        else DeduplicationReport(kept=split.train, dropped=())
    )
    return DemoCorpus(
        train=report.kept,
        held_out=split.held_out,
        summary=CorpusSummary(
            source=f"the standard library of Python {platform.python_version()}",
            train_documents=len(report.kept),
            train_bytes=sum(len(document.data) for document in report.kept),
            held_out_documents=len(split.held_out),
            held_out_bytes=sum(len(document.data) for document in split.held_out),
            held_out_packages=tuple(sorted({document.group for document in split.held_out})),
            dropped=report.dropped,
        ),
    )


def check_same_text(corpus: DemoCorpus, *, train: TokenCache, held_out: TokenCache | None) -> None:
    """Make sure that what the report says was trained on and held out is what the run's token caches hold.

    Raises:
        DataError: a cache holds other documents.
    """
    for name, documents, cache in (("train", corpus.train, train), ("held-out", corpus.held_out, held_out)):
        if cache is None or cache.metadata.data_fingerprint != data_fingerprint(documents):
            raise DataError(
                f"the {name} text changed while the demo ran (its fingerprint is not the token cache's); leave the "
                f"interpreter's library as it is and start the demo again"
            )


def held_out_prompts(documents: Sequence[Document], *, count: int, prompt_bytes: int) -> list[DemoPrompt]:
    """Prompts from the largest files of the largest held-out packages, one per package as long as there are enough.

    A prompt starts at the first function or method behind the file's middle, at the first line start where there is
    none: the same rule for every file, so that nobody picked what looks well.

    Args:
        documents: held-out text.
        count: prompts wanted.
        prompt_bytes: length of each.

    Raises:
        DataError: fewer files than `count` are long enough.
    """
    usable = [document for document in documents if _prompt_start(document.data, prompt_bytes) is not None]
    if len(usable) < count:
        raise DataError(
            f"the held-out text has {len(usable)} files with {prompt_bytes} bytes behind their middle, {count} are "
            f"needed for prompts; hold out more text"
        )
    group_bytes: Counter[str] = Counter()
    for document in documents:
        group_bytes[document.group] += len(document.data)
    usable.sort(key=lambda document: (-group_bytes[document.group], -len(document.data), document.name))
    seen: Counter[str] = Counter()
    rounds: list[tuple[int, int, Document]] = []
    for position, document in enumerate(usable):
        rounds.append((seen[document.group], position, document))
        seen[document.group] += 1
    rounds.sort(key=lambda entry: entry[:2])
    prompts = []
    for _, _, document in rounds[:count]:
        start = _prompt_start(document.data, prompt_bytes)
        assert start is not None
        prompts.append(DemoPrompt(document.name, tuple(document.data[start : start + prompt_bytes])))
    return prompts


def _prompt_start(data: bytes, prompt_bytes: int) -> int | None:
    """Where the prompt of a file starts; None where no prompt of that length fits."""
    middle = len(data) // 2
    last = len(data) - prompt_bytes
    definition = _DEFINITION.search(data, middle)
    if definition is not None and definition.start() <= last:
        return definition.start()
    start = data.find(b"\n", middle) + 1
    return start if start and start <= last else None
