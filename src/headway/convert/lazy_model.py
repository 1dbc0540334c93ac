"""The common form between formats: a multi-token model whose tensors are read one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headway.model.config import MultiTokenConfig

WeightChange = Callable[[Tensor], Tensor]
"""Weights in float32 -> weights in float32 of the same shape."""

Origin = Literal["source", "copy", "fresh"]
"""Where values come from: the source checkpoint, a copy of the base's last layer, or the family's random initialiser."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed and can be forgotten afterwards.

    Attributes:
        shape: known without reading.
        dtype: known without reading.
        read: gives the values on the CPU, anew at each call.
        origin: where the values come from.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origin: Origin = "source"

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same values in another floating-point type; integers, and everything for None, stay as they are."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))

    def watched(self, done: Callable[[int], None]) -> LazyTensor:
        """The same tensor that reports its bytes after each reading."""

        def read() -> Tensor:
            tensor = self.read()
            done(self.num_bytes)
            return tensor

        return replace(self, read=read)


def filled(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A tensor of one value."""
    return LazyTensor(shape=shape, dtype=dtype, read=lambda: torch.full(shape, value, dtype=dtype))


@dataclass(frozen=True)
class LazyModel:
    """What every format is read to and written from.

    Attributes:
        config: Hugging Face configuration of the base as it is saved (L - n + 1 layers).
        mtp_config: n and the kind of heads; n = 1 has no heads.
        base: the base's state dict; a tied unembedding is left out.
        heads: the state dict of `MultiTokenLM.heads`, such as `0.self_attn.q_proj.weight` (offset 2).
        apart: the base's state dict where the format that is written leaves the base in its own folder, else empty;
            `base` is empty then.
        base_name: by which people know the base; never a path of this machine.
        generation: contents of the source's generation_config.json; None where it has none.
        left_out: tensors of the source that the model does not need, with the reason.
        notes: what a reader of the report should know, one sentence each.
    """

    config: Any
    mtp_config: MultiTokenConfig
    base: Mapping[str, LazyTensor]
    heads: Mapping[str, LazyTensor]
    base_name: str | None = None
    generation: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    apart: Mapping[str, LazyTensor] = field(default_factory=dict)

    @property
    def whole_base(self) -> Mapping[str, LazyTensor]:
        """The base's state dict, written or apart."""
        return {**self.apart, **self.base}

    @property
    def num_future_tokens(self) -> int:
        """N, the next token included."""
        return self.mtp_config.num_future_tokens

    @property
    def tensors(self) -> list[LazyTensor]:
        """Those that are written: of the base, then of the heads."""
        return [*self.base.values(), *self.heads.values()]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def map(self, change: Callable[[LazyTensor], LazyTensor]) -> LazyModel:
        """The same model with every tensor that is written passed through `change`."""
        return replace(
            self,
            base={name: change(tensor) for name, tensor in self.base.items()},
            heads={name: change(tensor) for name, tensor in self.heads.items()},
        )


class WrittenFormat(Protocol):
    """One layout of a model on disk that is written."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def marker(self) -> str:
        """The file, relative to the folder, by which a person recognises the format."""

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns, relative to the folder, of the files that hold the model (not the tokenizer, not the licence)."""

    @property
    def holds_heads(self) -> bool:
        """Whether offsets beyond the next token have a place in it."""

    @property
    def holds_base(self) -> bool:
        """Whether the base has a place in it; else a folder holds heads alone."""

    @property
    def is_hugging_face(self) -> bool:
        """Whether transformers loads the folder, and its tokenizer with it."""

    def prepare(self, model: LazyModel) -> LazyModel:
        """What of a model this format writes: without heads where it holds none; nothing is read.

        Raises:
            IncompatibleModelError: something that the format cannot hold exactly; names the nearest alternative.
        """

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """Fill an empty folder, one tensor in memory at a time; the file that makes it a model comes last.

        Args:
            model: what `prepare` gave.
            folder: an empty folder.

        Returns:
            Notes for the report.
        """


class ModelFormat(WrittenFormat, Protocol):
    """One layout that is read too."""

    def named_base(self, folder: Path) -> str | None:
        """By what name or path a folder of heads alone calls its base; None where it holds it or does not say.

        Raises:
            CheckpointError: a damaged folder.
        """

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """Open a folder without reading its weights; every tensor of it is accounted for.

        Args:
            folder: local folder.
            base: folder of the plain base, where the folder holds heads alone.

        Raises:
            CheckpointError: not a folder of this format, or damaged, or with tensors missing or unknown (all named).
            IncompatibleModelError: a model that headway has no place for.
        """

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """Logits [B, T, N, V] of the model in the folder, in float32, by the format's own reading of its weights.

        Args:
            folder: local folder.
            tokens_BT: token ids.
            base: as for `read`.
            change: applied to every weight, in float32, before it is used.
        """
