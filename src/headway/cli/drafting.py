"""Flags about drafts and their acceptance, shared by commands that generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from headway.errors import ConfigError, DataError

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
    help="What runs the model. eager: the Hugging Face model; lean: the same weights on fused blocks. Default: lean where a C++ "
    "compiler is found, with which it needs no second copy of the weights; else eager.",
)

DRAFTING_FLAGS: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--drafts",
        type=click.Choice(["heads", "lookup", "heads+lookup"]),
        help="Where drafts come from: the heads (default), copies from the text so far (lookup; any model), or both.",
    ),
    click.option(
        "--tree",
        metavar="NODES|JSON|calibrated|dynamic",
        help="Verify a tree of candidates per forward: how many, the tree as [[0], [1], [0, 0], ...], the one that `headway "
        "calibrate` stored for this machine, or one whose shape follows the draft's probabilities (dynamic). Default: a chain.",
    ),
    click.option("--tree-nodes", type=click.IntRange(min=1), help="Drafted tokens of a dynamic tree. Default: 15."),
    click.option(
        "--tree-width", type=click.IntRange(min=1), help="Candidates that a dynamic tree expands per depth. Default: 8."
    ),
    click.option(
        "--draft-vocabulary",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="JSON list of the token ids that the heads draft from; the text is the same. Default: all.",
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
        "--weights",
        type=click.Choice(["own", "int8"]),
        help="With --executor lean: the model's own weights (default), or rounded to int8, which is another model and says so.",
    ),
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


def default_executor() -> str:
    """What runs a model that is loaded to generate and for nothing else."""
    from headway.decoding.lean.native import library

    return "eager" if library() is None else "lean"


def drafting_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as arguments of `generate`; of flags that name an executor the default one.

    Raises:
        ConfigError: a tree that is no number, no JSON and none of these words; a draft vocabulary that is no list of numbers.
        DataError: a file that cannot be read.
    """
    arguments = {name: value for name, value in given.items() if value is not None}
    if "executor" in given:
        arguments.setdefault("executor", default_executor())
    if "draft_vocabulary" in arguments:
        arguments["draft_vocabulary"] = _read_ids(arguments["draft_vocabulary"])
    if arguments.get("tree", "calibrated") not in ("calibrated", "dynamic"):
        try:
            arguments["tree"] = json.loads(arguments["tree"])
        except json.JSONDecodeError:
            arguments["tree"] = None
        if not isinstance(arguments["tree"], int | list):
            raise ConfigError(
                f"--tree takes a number of nodes, a JSON list of paths such as [[0], [1], [0, 0]], calibrated or dynamic: got "
                f"{given['tree']!r}"
            )
    return arguments


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"--draft-vocabulary takes a file with a JSON list of token ids: {path} has none")
    return ids
