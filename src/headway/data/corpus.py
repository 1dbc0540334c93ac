"""What a run trains on and what it holds out, from sources to token caches.

    <directory>/<fingerprint>/    a token cache, shared by all corpora with the same text and tokenizer; in it,
        corpus-<key>.json         which caches make up a corpus with this one: found again without reading the text
    <directory>/streams/          what streams gave (`headway.data.formats.stream`)

The key of a corpus is made of its options and of size and time of the last change of every file. A file whose content
is changed while both stay is taken for unchanged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.cache_format import INDEX_PREFIX, TokenCache
from headway.data.cache_staging import remove_forgotten
from headway.data.collect import OpenedSource, collect, open_sources, source_labels
from headway.data.collection import Collection
from headway.data.corpus_spec import CorpusSpec
from headway.data.document import Document
from headway.data.files import SeenFiles
from headway.data.fingerprint import data_fingerprint, tokenizer_fingerprint
from headway.data.formats.token_file import TokenRules
from headway.data.mixture import Mixture, MixturePart, pack_rows
from headway.data.near_duplicates import drop_near_duplicates
from headway.data.packing import Rows
from headway.data.shares import block_counts
from headway.data.source_spec import SourceSpec
from headway.data.split import split_by_group, total_bytes
from headway.data.token_cache import build_token_cache
from headway.data.tokenizers import vocabulary_size
from headway.errors import DataError

_INDEX_VERSION = 1
_WORTH_A_NOTICE = 1 << 26

Notice = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class CorpusPart:
    """Tokens of one source of a mixture, or of all sources together.

    Attributes:
        name: for a person.
        cache: the tokens.
        weight: share of the mixture, relative to the others'.
    """

    name: str
    cache: TokenCache
    weight: float


@dataclass(frozen=True, eq=False)
class Corpus:
    """Encoded text.

    Attributes:
        parts: what is trained on; one, or the sources of a mixture.
        held_out: what is only evaluated on; None where nothing is held out.
    """

    parts: tuple[CorpusPart, ...]
    held_out: TokenCache | None

    @property
    def fingerprint(self) -> str:
        """Changes when the training tokens do, or the shares in which they are mixed."""
        if len(self.parts) == 1:
            return self.parts[0].cache.fingerprint
        counts = block_counts([part.weight for part in self.parts])
        content = [(part.cache.fingerprint, count) for part, count in zip(self.parts, counts, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Changes when any text could be encoded otherwise."""
        return self.parts[0].cache.metadata.tokenizer_fingerprint

    @property
    def num_tokens(self) -> int:
        """To train on, of all parts."""
        return sum(part.cache.num_tokens for part in self.parts)

    def rows(self, *, sequence_length: int, seed: int) -> Rows:
        """The rows of an epoch and their order; of a mixture a `Mixture`.

        Raises:
            ConfigError: sequence_length < 2.
            DataError: a part has prompts only.
        """
        packed = [pack_rows(part.cache, sequence_length=sequence_length, seed=seed) for part in self.parts]
        if len(packed) == 1:
            return packed[0]
        return Mixture(
            [MixturePart(part.name, rows, part.weight) for part, rows in zip(self.parts, packed, strict=True)],
            seed=seed,
        )


def prepare_corpus(
    spec: CorpusSpec,
    tokenizer: Any,
    directory: Path,
    *,
    notice: Notice = lambda text: None,
    workers: int | None = None,
) -> Corpus:
    """Read sources, hold text out and encode both, as far as that has not been done before.

    Memory stays bounded for text of any size: documents stay on disk.

    Args:
        spec: the sources.
        tokenizer: encodes; has an EOS token.
        directory: of the caches.
        notice: told one sentence per finding: what was read, left out, held out, dropped.
        workers: processes that encode; None takes one per usable core.

    Raises:
        DataError: sources that cannot be read or hold no text, or too little of it to hold something out.
        ConfigError: an option that cannot work.
    """
    rules = _token_rules(tokenizer)
    seen: SeenFiles = set()

    def opened(specs: Sequence[SourceSpec]) -> list[OpenedSource]:
        return open_sources(
            specs,
            token_rules=rules,
            stream_directory=directory / "streams",
            suffixes=spec.suffixes,
            seen=seen,
            notice=notice,
        )

    # held-out files first: one that lies in a folder of training text belongs to them
    held_out_sources = opened(spec.held_out) if spec.held_out else []
    sources = opened(spec.sources)
    index = f"{INDEX_PREFIX}{_index_key(spec, [sources, held_out_sources], tokenizer)}.json"
    corpus = _indexed(directory, index, notice)
    if corpus is not None:
        return corpus
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        notice(text)

    train, held_out = _documents(spec, sources, held_out_sources, say)

    def cache(documents: Sequence[Document]) -> TokenCache:
        key = hashlib.sha256(f"{data_fingerprint(documents)}{tokenizer_fingerprint(tokenizer)}".encode()).hexdigest()
        folder = directory / key[:16]
        size = total_bytes(documents)
        if size >= _WORTH_A_NOTICE and not folder.exists():
            notice(f"encoding {size / 1e6:.0f} MB of text")
        return build_token_cache(documents, tokenizer, folder, workers=workers)

    corpus = Corpus(
        parts=tuple(CorpusPart(name, cache(documents), weight) for name, documents, weight in _parts(spec, train)),
        held_out=cache(held_out) if held_out else None,
    )
    remove_forgotten(directory)
    _write_index(corpus.parts[0].cache.directory / index, corpus, said, notice)
    return corpus


def _token_rules(tokenizer: Any) -> TokenRules:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, and documents must end in one; "
            "set tokenizer.eos_token to one of its tokens"
        )
    end = int(tokenizer.eos_token_id)
    return TokenRules(end_token_id=end, vocabulary_size=max(vocabulary_size(tokenizer), end + 1))


def _documents(
    spec: CorpusSpec, sources: Sequence[OpenedSource], held_out_sources: Sequence[OpenedSource], notice: Notice
) -> tuple[Collection, Collection | None]:
    train, held_out = _collected(sources, spec, notice), None
    if held_out_sources:
        held_out = _collected(held_out_sources, spec, lambda text: notice(f"held out: {text}"))
    elif spec.held_out_fraction > 0:
        split = split_by_group(train, held_out_fraction=spec.held_out_fraction, seed=spec.split_seed)
        assert isinstance(split.train, Collection)
        assert isinstance(split.held_out, Collection)
        train, held_out = split.train, split.held_out
        notice(split.describe())
    if held_out is not None and spec.drop_near_duplicates:
        report = drop_near_duplicates(train, held_out)
        assert isinstance(report.kept, Collection)
        train = report.kept
        if report.dropped:
            notice(report.describe())
    if not train:
        raise DataError("no document is left to train on: all are near-duplicates of held-out text; add text")
    return train, held_out


def _collected(sources: Sequence[OpenedSource], spec: CorpusSpec, notice: Notice) -> Collection:
    collection = collect(sources, suffixes=spec.suffixes)
    for source in sources:
        notice(f"{source.spec.path}: {source.report.describe()}")
    return collection


def _parts(spec: CorpusSpec, train: Collection) -> list[tuple[str, Collection, float]]:
    if not spec.is_mixture:
        return [("all", train, 1.0)]
    parts = []
    for number, (source, label) in enumerate(zip(spec.sources, source_labels(spec.sources), strict=True)):
        documents = train.of_source(number)
        if not documents:
            raise DataError(
                f"nothing of the source {source.path!r} is left to train on, all of it is held out or repeats held-out "
                f"text; add text to it, or drop it"
            )
        parts.append((label, documents, source.weight or 1.0))
    return parts


def _index_key(spec: CorpusSpec, sources: Sequence[Sequence[OpenedSource]], tokenizer: Any) -> str:
    files = [[[file.name, *file.identity()] for source in group for file in source.files] for group in sources]
    content = [_INDEX_VERSION, dataclasses.asdict(spec), files, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(content).encode(errors="surrogatepass")).hexdigest()[:32]


def _indexed(directory: Path, name: str, notice: Notice) -> Corpus | None:
    """The corpus that an index names; None where there is none, or a cache is gone."""
    for index in directory.glob(f"*/{name}"):
        try:
            content = json.loads(index.read_bytes())
            parts = [(part["name"], directory / part["cache"], part["weight"]) for part in content["parts"]]
            held_out = None if content["held_out"] is None else directory / content["held_out"]
            said = [str(text) for text in content["notices"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        break
    else:
        return None
    if not all(folder.is_dir() for _, folder, _ in parts) or not (held_out is None or held_out.is_dir()):
        return None
    corpus = Corpus(
        parts=tuple(CorpusPart(name, TokenCache.open(folder), weight) for name, folder, weight in parts),
        held_out=None if held_out is None else TokenCache.open(held_out),
    )
    for text in said:
        notice(text)
    return corpus


def _write_index(index: Path, corpus: Corpus, said: Sequence[str], notice: Notice) -> None:
    content = {
        "parts": [
            {"name": part.name, "cache": part.cache.directory.name, "weight": part.weight} for part in corpus.parts
        ],
        "held_out": None if corpus.held_out is None else corpus.held_out.directory.name,
        "notices": list(said),
    }
    unfinished = index.with_name(f".{index.name}.writing")
    try:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(index)
    except OSError as error:
        # the caches are there and serve; only the next run has to read the text again to know it
        notice(f"warning: {str(index)!r} could not be written ({error.strerror}); the next run reads all text again")
