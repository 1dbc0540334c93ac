"""Flags about drafts and their acceptance, shared by commands that generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from headway.errors import ConfigError

Command = Callable[..., Any]


class DraftLength(click.ParamType):  # type: ignore[type-arg]  # a parameter of newer click only
    """A whole number from 0 on, or auto."""

    name = "K|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """See `click.ParamType.convert`."""
        if value == "auto":
            return "auto"
        try:
            length = int(value)
        except ValueError:
            length = -1
        if length < 0:
            self.fail(f"{value!r} is neither a whole number from 0 on nor auto.", param, ctx)
        return length


DRAFT_LENGTH = DraftLength()

EXECUTOR_FLAG: Callable[[Command], Command] = click.option(
    "--executor",
    type=click.Choice(["eager", "lean"]),
    help="What runs the model. eager (default): the Hugging Face model; lean: the same weights on fused blocks.",
)

DRAFTING_FLAGS: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--drafts",
        type=click.Choice(["heads", "lookup", "heads+lookup"]),
        help="Where drafts come from: the heads (default), copies from the text so far (lookup; any model), or both.",
    ),
    click.option(
        "--tree",
        metavar="NODES|JSON",
        help="Verify a tree of candidates per forward: how many, or the tree as [[0], [1], [0, 0], ...]. Default: a chain.",
    ),
    click.option("--num-lookup-tokens", type=click.IntRange(min=1), help="Tokens that a lookup copies. Default: 8."),
    click.option("--lookup-ngram", type=click.IntRange(min=1), help="Most tokens that a lookup matches. Default: 3."),
    click.option(
        "--acceptance",
        type=click.Choice(["exact", "tokenwise", "typical", "top_k", "distance"]),
        help="Which drafts stand. exact (default): the model's own text, or when sampling its own distribution; tokenwise: "
        "the same for --sample-drafts, decided token by token. LOSSY, other text than the model's: typical, top_k, distance.",
    ),
    click.option("--posterior-threshold", type=click.FloatRange(min=0), help="epsilon of typical. Default: 0.09."),
    click.option("--posterior-alpha", type=click.FloatRange(min=0), help="delta of typical. Default: 0.3."),
    click.option("--acceptance-top-k", type=click.IntRange(min=1), help="k of top_k. Default: 2."),
    click.option("--acceptance-distance", type=click.IntRange(min=0), help="Largest distance of ids. Default: 1."),
    click.option(
        "--sample-drafts",
        is_flag=True,
        default=None,
        help="When sampling, draw the drafts too: as exact, accepted more often at high temperatures.",
    ),
    EXECUTOR_FLAG,
    click.option(
        "--prefill-chunk-tokens",
        type=click.IntRange(min=1),
        help="Most tokens of a prompt that one forward reads; longer prompts are read in pieces. Default: 1024.",
    ),
)


def drafting_flags(command: Command) -> Command:
    """Give a command the flags; they arrive as keyword arguments of these names, None where not given."""
    for flag in reversed(DRAFTING_FLAGS):
        command = flag(command)
    return command


def drafting_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as arguments of `generate`.

    Raises:
        ConfigError: a tree that is neither a number nor JSON.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    if "tree" in arguments:
        try:
            arguments["tree"] = json.loads(arguments["tree"])
        except json.JSONDecodeError:
            arguments["tree"] = None
        if not isinstance(arguments["tree"], int | list):
            raise ConfigError(
                f"--tree takes a number of nodes or a JSON list of paths such as [[0], [1], [0, 0]]: got {given['tree']!r}"
            )
    return arguments
