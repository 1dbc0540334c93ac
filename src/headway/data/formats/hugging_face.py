"""Hugging Face datasets on disk: folders of `save_to_disk`, and what `load_dataset` has downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headway.data.formats.optional import optional_package
from headway.data.formats.records import RecordReader
from headway.data.formats.source_file import Entry, SourceFile
from headway.data.pieces import split_into_pieces
from headway.data.report import SourceReport
from headway.data.source_spec import HUB, SourceSpec
from headway.errors import DataError

_SPLIT = "train"
_ROWS_PER_BATCH = 256


class HuggingFaceTable(SourceFile):
    """Documents of the rows of one split of a dataset."""

    def __init__(self, dataset: Any, name: str, spec: SourceSpec) -> None:
        self.name, self.spec = name, spec
        columns = [column for column in dataset.column_names if _is_needed(column, spec)]
        # undecoded columns (images, audio) would be decoded for nothing
        self.dataset = dataset.with_format(None).select_columns(columns) if columns else dataset.with_format(None)
        self._fingerprint = str(dataset._fingerprint)
        self._first_row = 0
        self._batch: list[dict[str, Any]] = []

    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """One document per usable row.

        Raises:
            DataError: there is no such column; those that exist are named.
        """
        reader = RecordReader(self.spec, self.name)
        for row in range(len(self.dataset)):
            text = reader.read(self._record(row), report)
            if text is not None:
                yield Entry(row, row + 1, text.group, text.prompt_bytes, split_into_pieces(text.data))
        reader.finish()

    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The text of one row."""
        text = RecordReader(self.spec, self.name).read(self._record(position))
        if text is None:
            raise DataError(f"the dataset {self.name} changed while it was read; start again")
        yield from split_into_pieces(text.data)

    def identity(self) -> tuple[object, ...]:
        """The fingerprint that the library itself keeps, and the number of rows."""
        return self._fingerprint, len(self.dataset)

    def close(self) -> None:
        """Forget the rows held."""
        self._batch = []

    def _record(self, row: int) -> Mapping[str, Any]:
        if not self._first_row <= row < self._first_row + len(self._batch):
            columns = self.dataset[row : row + _ROWS_PER_BATCH]
            names = list(columns)
            rows = zip(*(columns[name] for name in names), strict=True)
            self._first_row, self._batch = row, [dict(zip(names, values, strict=True)) for values in rows]
        return self._batch[row - self._first_row]


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def load_table(spec: SourceSpec) -> Any:
    """The split of a saved dataset or of one of the hub; downloads what is not in the library's cache yet.

    Raises:
        DataError: it cannot be loaded, or has no such split; those that exist are named.
    """
    return _load(spec, streaming=False)


def load_stream(spec: SourceSpec) -> Any:
    """The split of a dataset of the hub as an iterable of records that is read from its start.

    Raises:
        DataError: it cannot be loaded, has no such split, or shuffles in a buffer.
    """
    return _load(spec, streaming=True)


def _load(spec: SourceSpec, *, streaming: bool) -> Any:
    datasets = optional_package("datasets", needed_for=f"reading {spec.path!r}")
    try:
        if spec.is_hub:
            name = spec.path.removeprefix(HUB)
            loaded = datasets.load_dataset(name, spec.config, revision=spec.revision, streaming=streaming)
        else:
            loaded = datasets.load_from_disk(spec.path)
    except Exception as error:  # the library, its readers and the network raise a type each
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"the dataset {spec.path!r} could not be loaded ({detail}); check its name, its configuration and the "
            f"network, or download it and name the folder"
        ) from error
    if not isinstance(loaded, Mapping):
        if spec.split is not None and str(getattr(loaded, "split", None)) != spec.split:
            raise DataError(f"the dataset {spec.path!r} has one split only; drop split={spec.split}")
        return loaded
    split = spec.split or _SPLIT
    if split not in loaded:
        raise DataError(
            f"the dataset {spec.path!r} has no split {split!r}; it has {', '.join(map(repr, loaded))}; pass split=NAME"
        )
    return loaded[split]


def _is_needed(column: str, spec: SourceSpec) -> bool:
    return any(name == column or name.startswith(f"{column}.") for name in spec.needed_fields)
