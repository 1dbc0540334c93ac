"""From a record (a JSON object, a row of a table) to the text it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from headway.data.report import SourceReport
from headway.data.source_spec import SourceSpec
from headway.errors import DataError

# a file whose first so many records all lack the field was meant to be read by another one
_PATIENCE = 100


class RecordText(NamedTuple):
    """What a record gives to train on.

    Attributes:
        data: prompt and completion, or the text.
        prompt_bytes: length of the prompt.
        group: the value of the field that groups records, None without one.
    """

    data: bytes
    prompt_bytes: int
    group: str | None


class RecordReader:
    """Reads the text of records, and counts those that have none.

    Args:
        spec: names the fields.
        where: the file, for messages.
    """

    def __init__(self, spec: SourceSpec, where: str) -> None:
        self.spec = spec
        self.where = where
        self._found = 0
        self._missing: list[tuple[str, ...]] = []

    def read(self, record: Mapping[str, Any], report: SourceReport | None = None) -> RecordText | None:
        """The text of one record; None where it is left out.

        Args:
            record: fields by name.
            report: counts what is left out.

        Raises:
            DataError: none of the first records has the field; the fields that exist are named.
        """
        report = SourceReport() if report is None else report
        spec = self.spec
        values = [_value(record, name) for name in spec.needed_fields]
        if any(value is _ABSENT for value in values):
            report.without_field += 1
            self._missing_fields(record)
            return None
        self._found += 1
        prefix = ""
        if spec.reward is not None:
            verdict = _verdict(_value(record, spec.reward))
            if verdict is None:
                report.without_reward += 1
                return None
            prefix = spec.correct if verdict else spec.incorrect
        group = None if spec.group is None else f"{_value(record, spec.group)}"
        if spec.prompt is None or spec.completion is None:
            text = _bytes(_value(record, spec.field or "text"))
            prompt = b""
        else:
            text = _bytes(_value(record, spec.completion))
            given = _bytes(_value(record, spec.prompt))
            if given is None:
                text = None
            prompt = _encoded(prefix) + (given or b"")
        if text is None:
            report.not_text += 1
            return None
        if not text:  # a prompt without a completion has nothing to learn from
            report.empty += 1
            return None
        return RecordText(prompt + text, len(prompt), group)

    def finish(self) -> None:
        """Refuse a file of which no record had the field.

        Raises:
            DataError: the fields that exist are named.
        """
        if self._missing and not self._found:
            missing = [name for name in self.spec.needed_fields if any(name not in known for known in self._missing)]
            known = sorted(set().union(*self._missing))
            raise DataError(
                f"the records of {self.where} have no field {' and no field '.join(map(repr, missing))}; they have "
                f"{', '.join(map(repr, known)) or 'no fields'}; {self._hint(known)}"
            )

    def _missing_fields(self, record: Mapping[str, Any]) -> None:
        if self._found or len(self._missing) >= _PATIENCE:
            return
        self._missing.append(_field_names(record))
        if len(self._missing) == _PATIENCE:
            self.finish()

    def _hint(self, known: list[str]) -> str:
        if not self.spec.is_examples and {"prompt", "completion"} <= set(known):
            return f"pass {self.spec.path}::prompt=prompt,completion=completion"
        if self.spec.is_examples:
            return f"pass {self.spec.path}::prompt=NAME,completion=NAME"
        return f"pass {self.spec.path}::field=NAME, or format=text to train on the file as it is"


_ABSENT = object()


def field_value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, None where there is no such field; dots enter nested records."""
    value = _value(record, name)
    return None if value is _ABSENT else value


def _value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field; dots enter nested records where no field has the whole name."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _field_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    names: list[str] = []
    for name, value in record.items():
        names.append(str(name))
        if isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in value]
    return tuple(names)


def _bytes(value: Any) -> bytes | None:
    """The bytes of a text; None is an empty text, anything else is none."""
    if value is None:
        return b""
    if isinstance(value, str):
        return _encoded(value)
    return value if isinstance(value, bytes) else None


def _encoded(text: str) -> bytes:
    """UTF-8; bytes that were not (`surrogateescape`) as they were, half surrogates of JSON escapes as three bytes."""
    for errors in ("strict", "surrogateescape", "surrogatepass"):
        try:
            return text.encode("utf-8", errors)
        except UnicodeEncodeError:
            continue
    raise AssertionError("surrogatepass encodes every text")


def _verdict(value: Any) -> bool | None:
    """Whether a reward says correct or incorrect; None where it says neither."""
    if isinstance(value, str):
        return {"correct": True, "true": True, "incorrect": False, "false": False}.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None
