"""Typed fields: one declaration that YAML, the command line and the help text all read.

A configuration is a frozen dataclass whose fields are made by `option`. The annotation is the whole type
check: `int`, `float`, `bool`, `str`, a `Literal` of strings, a tuple of those, or any of them `| None`.
`parse_value` reads what YAML or Python gives, `parse_text` what a command line gives; both refuse with the
field's name, what was got and what is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from headway.errors import ConfigError

ResumeRule = Literal["refuse", "announce", "free"]
"""What a change of the field means for a run that is resumed: another run, a change to name, or nothing."""


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """What a field is, beyond its name: everything that help texts and readers need."""

    name: str
    annotation: Any
    default: Any
    help: str
    unit: str | None
    group: str
    on_resume: ResumeRule
    at_least: float | None
    above: float | None
    below: float | None

    @property
    def flag(self) -> str:
        """The command line's spelling: `num_future_tokens` is `--num-future-tokens`."""
        return "--" + self.name.replace("_", "-")


def option(
    default: Any,
    help: str,
    *,
    group: str,
    unit: str | None = None,
    on_resume: ResumeRule = "announce",
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a configuration field: default, help text, unit, section and limits of every number in it."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "unit": unit,
            "group": group,
            "on_resume": on_resume,
            "at_least": at_least,
            "above": above,
            "below": below,
        },
    )


def field_specs(config_class: type[Any]) -> Mapping[str, FieldSpec]:
    """The fields of a configuration class by name, in the order of declaration."""
    hints = typing.get_type_hints(config_class)
    return types.MappingProxyType(
        {
            field.name: FieldSpec(
                name=field.name,
                annotation=hints[field.name],
                default=field.default,
                **field.metadata,
            )
            for field in dataclasses.fields(config_class)
        }
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest known one, or the whole list where none is near.

    >>> nearest("learning-rat", ["learning-rate", "steps"])
    "did you mean 'learning-rate'?"
    >>> nearest("zzz", ["b", "a"])
    'known are a, b'
    """
    candidates = sorted(known)
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(candidates)}"


def is_optional(annotation: Any) -> bool:
    """Whether None is one of the field's values."""
    return type(None) in _members(annotation)


def required_type(annotation: Any) -> Any:
    """The annotation without its `| None`."""
    members = [member for member in _members(annotation) if member is not type(None)]
    assert len(members) == 1, f"a configuration field has one type beside None, got {annotation}"
    return members[0]


def type_name(annotation: Any) -> str:
    """The type in a reader's words.

    >>> type_name(tuple[float, float]), type_name(int | None), type_name(Literal["on", "off"])
    ('2 numbers', 'a whole number or none', 'one of on, off')
    """
    suffix = " or none" if is_optional(annotation) else ""
    annotation = required_type(annotation)
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(typing.get_args(annotation))}{suffix}"
    if typing.get_origin(annotation) is tuple:
        members = typing.get_args(annotation)
        plural = {int: "whole numbers", float: "numbers", str: "texts"}[members[0]]
        return (f"a list of {plural}" if members[-1] is Ellipsis else f"{len(members)} {plural}") + suffix
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[annotation] + suffix


def check_limits(spec: FieldSpec, value: Any) -> None:
    """Refuse a number outside the field's limits.

    Raises:
        ConfigError: names the field, the number and the limit.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for limit, broken, word in (
            (spec.at_least, operator.lt, "at least"),
            (spec.above, operator.le, "more than"),
            (spec.below, operator.ge, "less than"),
        ):
            if limit is not None and broken(number, limit):
                raise ConfigError(f"{spec.name} must be {word} {limit:g}: got {number:g}; correct the value")


def parse_value(value: Any, annotation: Any, *, where: str) -> Any:
    """Return `value` as the annotation's type, or refuse it.

    Whole numbers serve as numbers, and so does text that spells one (YAML 1.1 reads `3e-4` as text);
    nothing else is
    converted: `true` is no number and `2.0` no whole number.

    Raises:
        ConfigError: the value is of another type; `where` names the field and its source.
    """
    if value is None and is_optional(annotation):
        return None
    wanted = required_type(annotation)
    refusal = ConfigError(f"{where} takes {type_name(annotation)}: got {value!r}; correct the value")
    if typing.get_origin(wanted) is Literal:
        # YAML 1.1 reads a bare on/off as a truth value; the closed choice tells which word was meant.
        word = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if word not in typing.get_args(wanted):
            raise ConfigError(f"{where} takes {type_name(annotation)}: got {value!r}; choose one of them")
        return word
    if typing.get_origin(wanted) is tuple:
        return _parse_tuple(value, wanted, where=where, refusal=refusal)
    if wanted is float:
        return _parse_number(value, refusal)
    if wanted is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refusal
        return value
    if wanted is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, wanted):
        raise refusal
    return value


def parse_text(text: str, annotation: Any, *, where: str) -> Any:
    """Return what a command line's word means for the annotation; `none` is None where that is allowed.

    >>> parse_text("0.9,0.95", tuple[float, float], where="--betas")
    (0.9, 0.95)
    >>> parse_text("none", int | None, where="--eval-every-steps") is None
    True
    """
    if is_optional(annotation) and text.strip().lower() == "none":
        return None
    wanted = required_type(annotation)
    if typing.get_origin(wanted) is tuple:
        member = typing.get_args(wanted)[0]
        return parse_value([_word(part, member) for part in text.split(",")], annotation, where=where)
    return parse_value(_word(text, wanted), annotation, where=where)


def _word(text: str, wanted: Any) -> Any:
    text = text.strip()
    if wanted is int:
        try:
            return int(text)
        except ValueError:
            return text
    if wanted is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


def _members(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _parse_number(value: Any, refusal: ConfigError) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refusal
    try:
        number = float(value)
    except ValueError:
        raise refusal from None
    if not math.isfinite(number):
        raise refusal
    return number


def _parse_tuple(value: Any, wanted: Any, *, where: str, refusal: ConfigError) -> tuple[Any, ...]:
    members = typing.get_args(wanted)
    if isinstance(value, str) and members[0] is str:
        value = [value]
    if not isinstance(value, list | tuple):
        raise refusal
    if members[-1] is not Ellipsis and len(value) != len(members):
        raise refusal
    return tuple(parse_value(item, members[0], where=where) for item in value)
