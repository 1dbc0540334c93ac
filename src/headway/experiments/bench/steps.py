"""Where a step's time goes: draft, verify, the rest; and how near it is to reading its bytes once.

Legend: B rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.decoding.engine import ENGINE, decoding_context
from headway.errors import DecodingError, HeadwayError
from headway.evaluation.step_bytes import StepBytes, bytes_per_step
from headway.experiments.bench.generation import Arm, Limits, PromptBatch
from headway.experiments.bench.measure import Clock
from headway.experiments.heads.variants import PLAIN as NO_HEADS
from headway.experiments.heads.variants import VARIANTS
from headway.model.config import MultiTokenConfig
from headway.model.memory import attached_footprint
from headway.model.multi_token_lm import MultiTokenLM

MOST_BYTES_READ = 1 << 29
"""So much of the weights is read to measure the memory: more than caches hold, and no second copy of a large model."""


@dataclass(frozen=True)
class StepParts:
    """Seconds of a forward's parts: medians over the forwards of one generation apart from the timed rounds.

    Attributes:
        verify: base and heads on the block, and the base's logits.
        draft: the heads' logits and the next block.
        rest: acceptance, the cache's bookkeeping, this loop.
        forwards: that the medians are over.
    """

    verify: float
    draft: float
    rest: float
    forwards: int


class _Timed:
    """Passes everything on to another object, and adds up the seconds of some of its methods."""

    def __init__(self, inner: Any, methods: frozenset[str], clock: Clock) -> None:
        self._inner, self._methods, self._clock = inner, methods, clock
        self._seconds = 0.0

    def take(self) -> float:
        """Seconds since the last call of this."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._methods:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._clock.read()[0]
            given = found(*args, **kwargs)
            self._seconds += self._clock.read()[0] - start
            return given

        return call


def step_parts(model: MultiTokenLM, arm: Arm, batch: PromptBatch, limits: Limits, *, clock: Clock) -> StepParts | None:
    """Parts of an arm's forwards after the prefill; None where the first token ended every row."""
    loop: Any = ENGINE.start(
        model, batch.ids_BT, attention_mask=batch.mask_BT, **(limits.own_arguments() | arm.arguments)
    )
    executor = _Timed(loop.executor, frozenset({"block", "tree_block", "logits"}), clock)
    drafter = None if loop.drafter is None else _Timed(loop.drafter, frozenset({"block"}), clock)
    with decoding_context(model):
        loop.step()
        loop.executor = executor
        if drafter is not None:
            loop.drafter = drafter
        parts: list[tuple[float, float, float]] = []
        while not loop.finished:
            start = clock.read()[0]
            loop.step()
            seconds = clock.read()[0] - start
            verify = executor.take()
            draft = 0.0 if drafter is None else drafter.take()
            parts.append((verify, draft, seconds - verify - draft))
    if not parts:
        return None
    verify, draft, rest = map(statistics.median, zip(*parts, strict=True))
    return StepParts(verify, draft, rest, len(parts))


def weight_reader(model: MultiTokenLM) -> tuple[Callable[[], object], int]:
    """A function that reads the weights of a plain step once (or the first `MOST_BYTES_READ` of them), and their bytes.

    They are summed as integers, which costs no conversion: only the memory is measured. The table of embeddings, of
    which a step reads one row, is left out where the unembedding is another one.
    """
    table: Any = model.get_input_embeddings()
    left_out = {table.weight.data_ptr()} - {model.family.lm_head.weight.data_ptr()}
    parts: list[Tensor] = []
    size = 0
    for parameter in model.base.parameters():
        if parameter.data_ptr() not in left_out and size < MOST_BYTES_READ:
            part = parameter.detach().contiguous().view(-1).view(torch.uint8)[: MOST_BYTES_READ - size]
            parts.append(part)
            size += part.numel()
    flat = torch.cat(parts)
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)

    def read() -> Tensor:
        return words.sum()

    return read, words.numel() * 8


@dataclass(frozen=True)
class HeadFloor:
    """What one kind of heads adds to the bytes of a plain step, each weight read once.

    Attributes:
        heads: name of the kind (`headway experiments heads`).
        bytes: weights of base and heads.
        over_plain: over those of a plain step: the least that a drafting step can cost where memory is the limit.
    """

    heads: str
    bytes: int
    over_plain: float


def head_floors(model: MultiTokenLM, *, num_draft_tokens: int) -> tuple[HeadFloor, ...]:
    """The byte floor of each kind of heads on this model's base; kinds that the base cannot have are left out.

    Counted on torch's meta device: no heads are made. Tables that are looked up, of which a step reads rows, do not count.

    Args:
        model: whose base and precision count.
        num_draft_tokens: heads of each kind.
    """
    weight = model.family.lm_head.weight
    plain = plain_step_parameters(model) * weight.element_size()
    floors = []
    for variant in VARIANTS.values():
        fields = {name: value for name, value in variant.fields.items() if name != "num_future_tokens"}
        if variant.name == NO_HEADS:
            continue
        try:
            config = MultiTokenConfig(
                num_future_tokens=num_draft_tokens + 1, allow_base_change=fields.get("wiring") == "anticausal", **fields
            )
            found = attached_footprint(model.base.config, config, dtype=weight.dtype)
        except HeadwayError:
            continue
        looked_up = weight.shape[0] * int(fields.get("markov_rank", 0))
        heads = (found.head_parameters - looked_up) * weight.element_size()
        floors.append(HeadFloor(variant.name, plain + heads, (plain + heads) / plain))
    return tuple(floors)


def plain_step_parameters(model: MultiTokenLM) -> int:
    """Weights that a plain step reads: all of the base, its table of embeddings only where it is the unembedding too."""
    table: Any = model.get_input_embeddings()
    untied = table.weight.data_ptr() != model.family.lm_head.weight.data_ptr()
    every: int = sum(parameter.numel() for parameter in model.base.parameters())
    return every - int(table.weight.numel()) if untied else every


def bytes_of(model: MultiTokenLM, arm: Arm, prompt: list[int]) -> StepBytes | None:
    """Bytes that a step of the arm reads at batch 1, as the eager engine runs it; None where there is no such step.

    Of a tree or a copied draft they are those of a chain of as many heads: what more its nodes read is in caches.
    """
    if arm.other_weights or arm.heads is None:
        return None
    device = next(model.parameters()).device
    try:
        return bytes_per_step(model, torch.tensor(prompt, device=device), num_draft_tokens=arm.heads)
    except DecodingError:
        return None
