"""Command-line options from a configuration class: one typed field is one flag with its help.

A flag that is not given leaves its field to the recipe, the configuration file or the default; `none` unsets a field
that can be unset. Lists of texts are repeatable flags, lists of numbers are comma-separated.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource

from headway.training.fields import FieldSpec, field_specs, parse_text, required_type

Command = TypeVar("Command", bound=Callable[..., Any])

_OTHER = "Options"


class FieldType(click.ParamType[Any]):
    """Reads a word as the field's type; the field's own reader refuses, with its own message."""

    def __init__(self, spec: FieldSpec) -> None:
        """Read for the field `spec`."""
        self._spec = spec
        self.name = _word_for(spec.annotation)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The field's value; raises the `ConfigError` of `parse_text`."""
        if not isinstance(value, str):
            return value
        if _is_repeatable(self._spec):
            return value
        return parse_text(value, self._spec.annotation, where=self._spec.flag)


class FieldOption(click.Option):
    """A flag of a configuration field; knows the section of the help text that it belongs to."""

    def __init__(self, spec: FieldSpec) -> None:
        """Make the flag of `spec`."""
        self.group = spec.group
        declaration = spec.flag
        facts = [fact for fact in (spec.unit, _default(spec)) if fact]
        settings: dict[str, Any] = {"help": spec.help + (f" [{'; '.join(facts)}]" if facts else ""), "default": None}
        if spec.annotation is bool:
            declaration = f"{spec.flag}/--no-{spec.flag.removeprefix('--')}"
        else:
            settings |= {"type": FieldType(spec), "metavar": _word_for(spec.annotation)}
            settings["multiple"] = _is_repeatable(spec)
        super().__init__([declaration, spec.name], **settings)


class SectionedCommand(click.Command):
    """A command whose help shows the fields in their sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group of fields; the command's own options come first."""
        sections: dict[str, list[tuple[str, str]]] = {_OTHER: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "group", _OTHER), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def config_options(config_class: type[Any]) -> Callable[[Command], Command]:
    """Give a command one flag per field of a configuration class; see `given_fields` for what was set."""

    def decorate(command: Command) -> Command:
        options = [FieldOption(spec) for spec in field_specs(config_class).values()]
        # click collects decorators from the inside out.
        parameters = getattr(command, "__click_params__", [])
        command.__click_params__ = [*reversed(options), *parameters]  # type: ignore[attr-defined]
        return command

    return decorate


def given_fields(context: click.Context, config_class: type[Any]) -> dict[str, Any]:
    """The fields that the command line sets, by name."""
    given = {}
    for name, spec in field_specs(config_class).items():
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        value = context.params[name]
        if _is_repeatable(spec) and tuple(value) == ("none",):
            value = None
        given[name] = value
    return given


def _is_repeatable(spec: FieldSpec) -> bool:
    wanted = required_type(spec.annotation)
    return typing.get_origin(wanted) is tuple and typing.get_args(wanted)[0] is str


def _word_for(annotation: Any) -> str:
    wanted = required_type(annotation)
    if typing.get_origin(wanted) is Literal:
        return "|".join(typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        members = typing.get_args(wanted)
        if members[0] is str:
            return "TEXT"
        return ",".join(["NUMBER"] * len(members)) if members[-1] is not Ellipsis else "NUMBER,..."
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "BOOLEAN"}[wanted]


def _default(spec: FieldSpec) -> str | None:
    # What an unset field means stands in its help text.
    return None if spec.default is None else f"default: {_shown(spec.default)}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_shown(item) for item in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
