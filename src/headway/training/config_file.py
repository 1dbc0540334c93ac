"""Configurations as files: YAML in and out, and the recipes that ship with headway.

Precedence, later wins: the fields' defaults, the recipe, the configuration file, what the caller (a flag)
sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from headway.data.source_spec import source_lines
from headway.errors import ConfigError
from headway.training.config import SOURCES, TrainConfig
from headway.training.fields import field_specs, nearest, parse_value

_ALTERNATIVES = (
    (("size",), ("base_config",), ("init_from",), ("hidden_size", "num_layers", "num_heads")),
    (("warmup_steps",), ("warmup_fraction",)),
    (("steps",), ("epochs",)),
)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a configuration with two is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(
                    f"the key {key!r} stands twice (line {key_node.start_mark.line + 1}); keep one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def recipe_names() -> list[str]:
    """Names that `--recipe` takes, sorted."""
    folder = resources.files("headway.training") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_summaries() -> dict[str, str]:
    """Names that `--recipe` takes, sorted, each with the first line of its file."""
    return {name: recipe_text(name).splitlines()[0].removeprefix("# ") for name in recipe_names()}


def read_recipe(name: str) -> dict[str, Any]:
    """The checked fields that a recipe sets.

    Raises:
        ConfigError: no such recipe; the nearest name is given.
    """
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, recipe_names())}")
    return _checked_fields(_parse_yaml(recipe_text(name), source=f"recipe {name}"), source=f"recipe {name}")


def recipe_text(name: str) -> str:
    """The file of a recipe, comments included."""
    return (resources.files("headway.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The checked fields that a YAML file sets.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or has an unknown key or a value of another
            type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}; pass a YAML file in UTF-8") from error
    return _checked_fields(_parse_yaml(text, source=str(path)), source=str(path))


def resolve_config(
    *,
    recipe: str | None = None,
    config_file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Lay a recipe, a file and explicit values over the defaults and check the whole.

    Raises:
        ConfigError: from any of the parts, or from the combination.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        values = _laid_over(values, read_recipe(recipe))
    if config_file is not None:
        values = _laid_over(values, read_config_file(config_file))
    return TrainConfig(**_laid_over(values, _checked_fields(overrides or {}, source="options")))


def from_mapping(values: Mapping[str, Any], *, source: str) -> TrainConfig:
    """The configuration that a mapping spells (of a file, of a run); the inverse of `TrainConfig.to_dict`.

    Raises:
        ConfigError: an unknown key, with the nearest name, or a bad value.
    """
    return TrainConfig(**_checked_fields(values, source=source))


def to_yaml(config: TrainConfig) -> str:
    """All fields as YAML, one key a line, in sections; `read_config_file` reads them back."""
    lines: list[str] = []
    group = None
    values = config.to_dict()
    for name, spec in field_specs(TrainConfig).items():
        if spec.group != group:
            lines += ["", f"# {spec.group}"] if lines else [f"# {spec.group}"]
            group = spec.group
        # As the one item of a flow list, a value is always on one line: the brackets come off again.
        item = yaml.safe_dump([values[name]], default_flow_style=True, allow_unicode=True, width=10**9)
        lines.append(f"{name}: {item.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _laid_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` wins, and where it chooses one of several ways to say a thing, the other ways of `lower` go."""
    kept = dict(lower)
    for ways in _ALTERNATIVES:
        chosen = [way for way in ways if any(upper.get(name) is not None for name in way)]
        if chosen:
            for way in ways:
                if way not in chosen:
                    for name in way:
                        kept.pop(name, None)
    return kept | dict(upper)


def _parse_yaml(text: str, *, source: str) -> Mapping[str, Any]:
    try:
        # A subclass of SafeLoader: builds plain values only.
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{source} is not valid YAML: {detail}; correct it") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source} must hold 'key: value' lines: got a {type(values).__name__}; write one option per line"
        )
    return values


def _checked_fields(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    specs = field_specs(TrainConfig)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in specs:
            raise ConfigError(f"{source}: unknown key {name!r}; {nearest(str(name), specs)}")
        if name in SOURCES:
            value = _as_lines(value, where=f"{source}: {name}")
        checked[name] = parse_value(value, specs[name].annotation, where=f"{source}: {name}")
    return checked


def _as_lines(value: Any, *, where: str) -> Any:
    try:
        return source_lines(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
