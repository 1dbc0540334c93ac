"""The exceptions that headway raises for a caller's mistakes.

    HeadwayError
    |-- ConfigError              an option or a combination of options that cannot work (also a ValueError)
    |-- DataError                a text, a tokenizer or a label that cannot be used (also a ValueError)
    |-- CheckpointError          a folder on disk that is missing, truncated, mismatched or half written; has .path
    |-- IncompatibleModelError   a model that heads cannot be attached to; names what differs
    |-- DecodingError            a generation request that the engine refuses; names the way out
    |   `-- QueueFullError       more requests are waiting than may; try again later
    `-- TrainingError            a run that cannot start or go on

Every message says what was wrong, what was got, what the limit is and how to mend it. The command line prints it as one
line and exits with status 2.
"""

from __future__ import annotations

from os import PathLike, fspath


class HeadwayError(Exception):
    """Base class of every error that headway raises on purpose."""


class ConfigError(HeadwayError, ValueError):
    """An option or a combination of options that cannot work."""


class DataError(HeadwayError, ValueError):
    """A text, a tokenizer or a label that cannot be used."""


class CheckpointError(HeadwayError):
    """A folder or file on disk that cannot be read or written as a headway checkpoint.

    Attributes:
        path: the offending file or folder as given, or None where no single one is to blame.
    """

    def __init__(self, message: str, *, path: str | PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else fspath(path)


class IncompatibleModelError(HeadwayError, ValueError):
    """A model that heads cannot be attached to."""


class DecodingError(HeadwayError, ValueError):
    """A generation request that the engine cannot serve."""


class QueueFullError(DecodingError):
    """More requests are waiting than may."""


class TrainingError(HeadwayError, RuntimeError):
    """A training run that cannot start or go on."""
