"""Steps of the graph executor un-captured, drafts that are right at known places, and a watch for waits of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoding_cases import ragged_batch
from headway.decoding.executor import EagerExecutor
from headway.decoding.graphs.capture import call_instead, graph_settings
from headway.decoding.graphs.emission import Choice, GreedyChoice
from headway.decoding.graphs.executor import GraphExecutor
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import align_prompts
from tiny_models import VOCABULARY

NEW = 14


class NoHostWait(TorchDispatchMode):
    """Fails where an operation would make the host wait for the device, copy from or to it, or have a shape that depends
    on what is in a tensor: what no CUDA graph can hold."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "equal",
        "is_nonzero",
        "lift_fresh",
        "repeat_interleave.Tensor",
        "bincount",
        "allclose",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name == "lift_fresh" and args[0].ndim == 0:  # a number of the program, which becomes part of a kernel's call
            return func(*args, **(kwargs or {}))
        assert name not in self.FORBIDDEN, name
        assert name.split(".")[0] not in self.FORBIDDEN, name
        if name.startswith("index"):
            indices = [tensor for tensor in tree_leaves(args[1]) if isinstance(tensor, Tensor)]
            assert all(tensor.dtype != torch.bool for tensor in indices), f"{name} by a mask"
        output = func(*args, **(kwargs or {}))
        devices = {
            tensor.device
            for tensor in tree_leaves((args, kwargs, output))
            if isinstance(tensor, Tensor) and (tensor.ndim or tensor.device.type != "cpu")
        }
        assert len(devices) <= 1, f"{name} from device to device: {devices}"
        self.seen += 1
        return output


def graph_executor_on(
    model: Any, *, lengths: Sequence[int] = (9, 5, 12), choice: Choice | None = None, new: int = NEW, drafts: int = 3
) -> GraphExecutor:
    """An executor for a ragged batch, its steps un-captured."""
    batch = ragged_batch(lengths, "lrl"[: len(lengths)])
    prompts = align_prompts(batch.input_ids, batch.attention_mask, vocabulary=VOCABULARY)
    with graph_settings(capture=call_instead, ahead=0):
        return GraphExecutor(
            LeanModel(model), prompts, max_new_tokens=new, num_draft_tokens=drafts, choice=choice or GreedyChoice()
        )


def right_at_times(
    monkeypatch: pytest.MonkeyPatch, continuations: Sequence[Sequence[int]], *, share: float = 0.6, seed: int = 3
) -> list[Tensor]:
    """Make drafts of any executor the true continuation, spoilt at places that depend on row and position alone.

    Returns:
        What the heads themselves said, call after call.
    """
    generator = torch.Generator().manual_seed(seed)
    room = torch.zeros(8, 256, dtype=torch.long)
    for row, truth in enumerate(continuations):
        room[row, : len(truth)] = torch.tensor(truth)
    spoilt = torch.rand(room.shape, generator=generator) > share
    scripted = torch.where(spoilt, (room + 1) % VOCABULARY, room)
    said: list[Tensor] = []
    original: Callable[..., Tensor] = EagerExecutor.draft
    emitted = [0] * len(continuations)

    def draft(self: EagerExecutor, states: Any, accepted: Any, *, last_B: Any = None, count: int) -> Tensor:
        said.append(original(self, states, accepted, last_B=last_B, count=count).clone())
        if isinstance(self, GraphExecutor):
            next_B = self.state.made_B + accepted + 1
        else:
            if len(said) == 1:
                emitted[:] = [0] * len(emitted)
            for row, right in enumerate(accepted):
                emitted[row] += right + 1
            next_B = torch.tensor(emitted)
        places = (next_B[:, None] + torch.arange(count)).clamp(max=255)
        return scripted[: len(next_B)].gather(1, places)

    monkeypatch.setattr(EagerExecutor, "draft", draft)
    return said
