"""The arms: names as a user gives them, and what each runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from headway.decoding.calibration.use import with_calibration
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.lean.admission import lean_model
from headway.decoding.options import DecodingOptions, plan_drafts
from headway.errors import ConfigError, HeadwayError
from headway.experiments.bench.generation import Arm, Generation, Limits, PromptBatch, Skipped
from headway.experiments.bench.other_engines import hugging_face, llama_cpp
from headway.model.multi_token_lm import MultiTokenLM

PLAIN = "plain"
HUGGING_FACE = "hf"
INT8 = "int8"
OWN_ARMS = (PLAIN, "chain", "tree", "calibrated", "dynamic", "auto", "lookup", "heads+lookup", INT8)
OTHER_ARMS = (HUGGING_FACE, "hf-static", "hf-lookup", "hf-assisted", "llama.cpp")
ARMS = OWN_ARMS + OTHER_ARMS
"""Names to choose from; "chain" stands for "chain-1", "chain-2", ..., one for each draft length, and
"int8" for plain decoding and the controller on rounded weights."""
DEFAULT_ARMS = tuple(name for name in ARMS if name != INT8)
"""Rounded weights are another model, which nobody measures who does not name it."""
EXECUTORS = ("eager", "lean")


@dataclass(frozen=True)
class ArmOptions:
    """What is measured.

    Attributes:
        names: of `ARMS`, or "chain-K".
        executors: each runs every arm of this project's engine.
        tree: of the arms "tree" and "heads+lookup": drafted tokens of the default tree, paths of ranks, or "calibrated".
        num_lookup_tokens: that a copy drafts, here and in Hugging Face's prompt lookup.
        assistant: folder of a smaller model for Hugging Face's assisted generation.
        gguf: files for llama.cpp.
        export: makes such files of the model where none are given; None for none.
    """

    names: tuple[str, ...] = DEFAULT_ARMS
    executors: tuple[str, ...] = EXECUTORS
    tree: int | str | Sequence[Sequence[int]] = 12
    num_lookup_tokens: int = 8
    assistant: Path | None = None
    gguf: tuple[Path, ...] = field(default=())
    export: Callable[[], Sequence[Path]] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ARMS and not _draft_length(name):
                raise ConfigError(f"there is no arm {name!r}; choose from {', '.join(ARMS)}, or chain-K for one length")
        for name in self.executors:
            if name not in EXECUTORS:
                raise ConfigError(f"there is no executor {name!r}; choose from {', '.join(EXECUTORS)}")
        if PLAIN not in self.names or not self.executors:
            raise ConfigError("the plain arm is what everything is compared with: keep 'plain' among --arms")


def build_arms(model: MultiTokenLM, options: ArmOptions, limits: Limits) -> tuple[list[Arm], list[Skipped]]:
    """Every arm that this model can run, and why it cannot run the others.

    Args:
        model: in eval mode.
        options: what was asked for.
        limits: where every arm stops.
    """
    arms: list[Arm] = []
    skipped: list[Skipped] = []
    for executor in options.executors:
        suffix = "" if executor == "eager" else f"/{executor}"
        if executor != "lean" and INT8 in options.names and "lean" not in options.executors:
            skipped.append(Skipped(INT8, "int8 weights need the lean executor"))
        if executor == "lean" and isinstance(reason := lean_model(model), str):
            skipped += [Skipped(name + suffix, f"no lean executor: {reason}") for name in options.names if _own(name)]
            continue
        for name, arguments in _own_arms(model, options, executor):
            if isinstance(arguments, str):
                skipped.append(Skipped(name + suffix, arguments))
                continue
            # What is calibrated holds for one executor.
            arguments = arguments | {"executor": executor}
            try:
                asked = DecodingOptions(**arguments)
                _, ignored = with_calibration(asked, model, batch=1)
                plan = plan_drafts(asked, model, do_sample=False)
            except HeadwayError as error:
                skipped.append(Skipped(name + suffix, str(error)))
                continue
            rounded = asked.weights == "int8"
            ignored = ignored or (_why_no_int8(model) if rounded else None)
            if ignored:
                skipped.append(Skipped(name + suffix, ignored))
                continue
            arms.append(
                Arm(
                    name=name + suffix,
                    engine="headway",
                    executor=executor,
                    plain=name in (PLAIN, INT8),
                    decode=partial(_decode, model, limits, arguments),
                    arguments=arguments,
                    heads=None if asked.num_draft_tokens == "auto" else plan.heads,
                    other_weights=rounded,
                    other_model=rounded,
                )
            )
    for name in options.names:
        if name == "llama.cpp":
            made = llama_cpp(options.gguf, limits, export=options.export)
        elif name in OTHER_ARMS:
            made = hugging_face(
                name, model, limits, assistant=options.assistant, num_lookup_tokens=options.num_lookup_tokens
            )
        else:
            continue
        for one in made:
            if isinstance(one, Arm):
                arms.append(one)
            else:
                skipped.append(one)
    return arms, skipped


def _own(name: str) -> bool:
    return name in OWN_ARMS or bool(_draft_length(name))


def _draft_length(name: str) -> int:
    kind, _, number = name.partition("-")
    return int(number) if kind == "chain" and number.isdecimal() else 0


def _why_no_int8(model: MultiTokenLM) -> str | None:
    made = lean_model(model, weights="int8")
    return made if isinstance(made, str) else None


def _own_arms(model: MultiTokenLM, options: ArmOptions, executor: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Names, and arguments of `generate` or why there are none."""
    most = model.num_future_tokens - 1
    needs_heads = "the model has no heads that draft"
    copied = {"num_lookup_tokens": options.num_lookup_tokens}
    for name in options.names:
        if name == PLAIN:
            yield name, {"num_draft_tokens": 0}
        elif name == "lookup":
            yield name, {"drafts": "lookup", **copied}
        elif name == INT8:
            if executor == "lean":
                yield name, {"num_draft_tokens": 0, "weights": "int8"}
                if most:
                    yield f"{name}-auto", {"num_draft_tokens": "auto", "weights": "int8"}
        elif not _own(name):
            continue
        elif most == 0:
            yield name, needs_heads
        elif name == "chain":
            yield from ((f"chain-{length}", {"num_draft_tokens": length}) for length in range(1, most + 1))
        elif name == "tree":
            yield name, {"tree": options.tree}
        elif name in ("calibrated", "dynamic"):
            yield name, {"tree": name}
        elif name == "auto":
            yield name, {"num_draft_tokens": "auto"}
        elif name == "heads+lookup":
            yield name, {"drafts": "heads+lookup", "tree": options.tree, **copied}
        else:
            yield name, {"num_draft_tokens": _draft_length(name)}


def _decode(
    model: MultiTokenLM,
    limits: Limits,
    arguments: dict[str, Any],
    batch: PromptBatch,
    first_token: Callable[[], None],
) -> Generation:
    return run_own(model, batch, limits.own_arguments() | arguments, first_token)


def run_own(
    model: MultiTokenLM, batch: PromptBatch, arguments: dict[str, Any], first_token: Callable[[], None]
) -> Generation:
    """One generation of this project's engine, the prefill marked."""
    loop = ENGINE.start(model, batch.ids_BT, attention_mask=batch.mask_BT, **arguments)
    with decoding_context(model):
        loop.step()
        first_token()
        while not loop.finished:
            loop.step()
    result = loop.result()
    lengths = result.acceptance.lengths
    return Generation(
        tokens=[loop.new_tokens(row) for row in range(batch.rows)],
        first=1,
        forwards=max(map(len, lengths)),
        lengths=lengths,
        drafted=result.acceptance.drafted,
        accepted=result.acceptance.accepted,
        note=result.note,
    )
