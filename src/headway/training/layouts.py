"""What one device holds when a model is trained by several, and whether it fits.

none   one device has everything
ddp    every device has everything; the gradients of its own rows are its own
fsdp   every device has a part of all weights, gradients and moments; what it computes with is whole for a moment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from headway.training.parallel import Mode, sharded_parts

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process at the peak of a step.

    Attributes:
        weights: float32; its part of them with fsdp.
        gradients: float32; its part of them with fsdp.
        optimizer: AdamW's two moments, or Muon's one for the matrices; its part of them with fsdp.
        activations: what autograd keeps of one micro-batch for the backward pass, with the layer that is recomputed
            where gradient checkpointing is on.
        loss: the chunk of logits that is alive, gradients of N hidden states and of the unembeddings.
        gathered: with fsdp, what is whole for a moment: weights and gradients of embedding and unembedding, the weights
            of two layers (one comes ahead) and the gradient of one.
        teacher: weights of another model that teaches, whole on every device; its activations are not kept.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    gathered: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        """Sum of all; temporaries of the backward pass and of the framework come on top."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.loss, self.gathered, self.teacher)
        return sum(parts)


@dataclass(frozen=True)
class Layout:
    """One way of training the model, and what it takes of each device.

    Attributes:
        parallel: none, ddp or fsdp.
        processes: devices that share the model; 1 for none.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        memory: of one device.
    """

    parallel: Mode
    processes: int
    gradient_checkpointing: bool
    memory: MemoryEstimate


def layouts(
    model: nn.Module, whole: MemoryEstimate, *, processes: int, activations: Sequence[tuple[bool, int]]
) -> tuple[Layout, ...]:
    """Every way of training the model on so many devices.

    Args:
        model: a `MultiTokenLM`, on the meta device.
        whole: what one device alone holds.
        processes: devices; 1 leaves only the way of one device.
        activations: bytes without and with gradient checkpointing.
    """
    modes: tuple[Mode, ...] = ("none",) if processes == 1 else ("none", "ddp", "fsdp")
    return tuple(
        Layout(
            mode,
            1 if mode == "none" else processes,
            checkpointing,
            of_one_device(model, replace(whole, activations=kept), mode=mode, processes=processes),
        )
        for mode in modes
        for checkpointing, kept in activations
    )


def of_one_device(model: nn.Module, whole: MemoryEstimate, *, mode: Mode, processes: int) -> MemoryEstimate:
    """What one of the devices holds, from what one alone would.

    Args:
        model: a `MultiTokenLM`, on the meta device.
        whole: of one device alone.
        mode: how they share the model.
        processes: how many they are.
    """
    if mode != "fsdp":
        return whole
    in_parts = [sum(_bytes(parameter) for parameter in part.parameters()) for part in _parts(model)]
    largest, root = max(in_parts, default=0), whole.weights - sum(in_parts)
    return replace(
        whole,
        weights=_share(whole.weights, processes),
        gradients=_share(whole.gradients, processes),
        optimizer=_share(whole.optimizer, processes),
        gathered=2 * root + 3 * largest,
    )


def exchanged_bytes(weights: int, *, mode: Mode, processes: int, micro_batches: int) -> int:
    """What one device sends in a step, in float32.

    ddp sends its gradients around a ring once a step; fsdp receives and passes on all weights twice and all gradients once
    for each micro-batch.

    >>> exchanged_bytes(1000, mode="ddp", processes=2, micro_batches=8)
    1000
    >>> exchanged_bytes(1000, mode="fsdp", processes=2, micro_batches=8)
    12000
    """
    once = weights * (processes - 1) // processes
    return {"none": 0, "ddp": 2 * once, "fsdp": 3 * once * micro_batches}[mode]


def _parts(model: nn.Module) -> list[nn.Module]:
    # each once: modules that all depths share stand in several places
    return list(dict.fromkeys(sharded_parts(model)))  # type: ignore[arg-type]


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * _FLOAT32_BYTES


def _share(number: int, processes: int) -> int:
    return -(-number // processes)
