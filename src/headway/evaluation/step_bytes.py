"""Bytes that one decoding step reads, counted while a real step runs.

At batch 1 a step is bound by memory: its weights and its cache must pass the processor once, whatever is computed with
them. Counted are the operations of the engine itself, so that a weight which a step uses twice (a shared module, the
unembedding of the base and of the heads) counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.decoding.engine import ENGINE, decoding_context
from headway.errors import DecodingError
from headway.evaluation.json_ready import json_ready
from headway.model.memory import cache_footprint
from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class StepBytes:
    """What one step of batch 1 reads.

    Attributes:
        weights: bytes of weights, each as often as an operation reads it; of an embedding the rows looked up.
        cache: bytes of keys and values at `context_length`, heads included.
        context_length: tokens in the cache.
        num_draft_tokens: drafted tokens that the step verifies and drafts anew; 0 is a plain step.
    """

    weights: int
    cache: int
    context_length: int
    num_draft_tokens: int

    @property
    def total(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache

    def to_json(self) -> dict[str, Any]:
        """All fields and the total."""
        fields: dict[str, Any] = json_ready(self)
        return fields | {"total": self.total}


class WeightReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, inside the block, the bytes of a module's weights that operations take as inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it read."""
        output = func(*args, **(kwargs or {}))
        # A view or a cast to the type that the tensor has reads nothing; whoever uses it does.
        if not func.is_view:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._storages:
                    looked_up = func in (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
                    read = output if looked_up else tensor
                    self.num_bytes += read.numel() * read.element_size()
        return output


def bytes_per_step(model: MultiTokenLM, prompt_T: Tensor, *, num_draft_tokens: int | None = None) -> StepBytes:
    """Bytes that the second decoding step after a prompt reads.

    Args:
        model: decoded with at batch 1.
        prompt_T: token ids [T] or [1, T]; their number is the context whose cache is counted.
        num_draft_tokens: 0 for a plain step; all heads where None.

    Raises:
        DecodingError: the model's longest context leaves no room for two steps after the prompt.
    """
    row_1T = prompt_T.reshape(1, -1)
    drafts = model.num_future_tokens - 1 if num_draft_tokens is None else num_draft_tokens
    room = 4 * (drafts + 1)
    # An end of text among the first tokens would leave no step to look at.
    loop = ENGINE.start(
        model,
        row_1T,
        attention_mask=torch.ones_like(row_1T),
        max_new_tokens=room,
        min_new_tokens=room,
        do_sample=False,
        num_draft_tokens=drafts,
    )
    with decoding_context(model):
        loop.step()
        if loop.finished:
            raise DecodingError("the model ended its text in the first step; pass another prompt")
        with WeightReads(model) as reads:
            loop.step()
    weight = model.family.lm_head.weight
    footprint = cache_footprint(
        model.config, model.num_future_tokens, dtype=weight.dtype, num_head_layers=model.heads.cache_layers(drafts)
    )
    return StepBytes(
        weights=reads.num_bytes,
        cache=footprint.total_bytes(context_length=row_1T.shape[1]),
        context_length=row_1T.shape[1],
        num_draft_tokens=drafts,
    )
