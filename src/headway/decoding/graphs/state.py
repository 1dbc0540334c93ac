"""The buffers of a captured step, and the queue that brings its results to the host.

Legend: B rows, C capacity in slots, W positions of the widest block, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FAILED = 2
"""Added to a record's last number where no token could be drawn; 1 is added where the row has ended."""


@dataclass(frozen=True)
class StepState:
    """Everything that changes from step to step, beside the cache; every tensor stays where it is.

    Attributes:
        block_BW: the last known token of each row and its draft, from the left.
        positions_B: position of each row's last known token.
        rooms_B: tokens a row may still get; 0 where it has ended.
        made_B: tokens a row has been given.
        text_BC: the tokens of each row by position, where heads read known tokens again.
        ends_V: whether a token ends the text.
        uniforms_BC: the number that decides about each new token, where tokens are drawn.
        record_BR: what the last step gave: W tokens, how many of them count, accepted drafts, and 1 for a row that has
            ended (+ FAILED).
    """

    block_BW: Tensor
    positions_B: Tensor
    rooms_B: Tensor
    made_B: Tensor
    text_BC: Tensor
    ends_V: Tensor
    uniforms_BC: Tensor
    record_BR: Tensor

    @classmethod
    def empty(cls, *, batch: int, width: int, capacity: int, vocabulary: int, device: torch.device) -> StepState:
        """Rows that have ended."""

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            block_BW=zeros(batch, width),
            positions_B=zeros(batch),
            rooms_B=zeros(batch),
            made_B=zeros(batch),
            text_BC=zeros(batch, capacity),
            ends_V=zeros(vocabulary, dtype=torch.bool),
            uniforms_BC=zeros(batch, capacity, dtype=torch.float64),
            record_BR=zeros(batch, width + 3),
        )

    def tensors(self) -> list[Tensor]:
        """All buffers."""
        return [getattr(self, field.name) for field in fields(self)]

    def snapshot(self) -> list[Tensor]:
        """Copies of all buffers."""
        return [tensor.clone() for tensor in self.tensors()]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Write a snapshot back."""
        for tensor, kept in zip(self.tensors(), snapshot, strict=True):
            tensor.copy_(kept)

    def begin(
        self,
        *,
        lengths: Sequence[int],
        rooms: Sequence[int],
        ends: frozenset[int],
        uniforms: Sequence[Sequence[float]] | None,
        ids_BP: Tensor,
    ) -> None:
        """Before a prefill.

        Args:
            lengths: tokens of each prompt.
            rooms: most tokens each row can get.
            ends: token ids that end a text.
            uniforms: per row the numbers of its new tokens; None where nothing is drawn.
            ids_BP: the prompts.
        """
        device = self.block_BW.device
        self.positions_B.copy_(torch.tensor(lengths, device=device) - 1)
        self.rooms_B.copy_(torch.tensor(rooms, device=device))
        self.made_B.zero_()
        self.block_BW.zero_()
        self.text_BC.zero_()
        self.text_BC[:, : ids_BP.shape[1]] = ids_BP
        self.ends_V.zero_()
        if ends:
            self.ends_V[torch.tensor(sorted(ends), device=device)] = True
        if uniforms is not None:
            numbers_BX = torch.tensor(uniforms, dtype=torch.float64, device=device)
            self.uniforms_BC[: numbers_BX.shape[0], : numbers_BX.shape[1]] = numbers_BX


@dataclass(frozen=True)
class RowRecord:
    """What one step gave one row.

    Attributes:
        tokens: the tokens it emitted.
        accepted: drafts that equal the model's own choice, from the front.
        finished: whether it has ended.
        failed: whether no token could be drawn.
    """

    tokens: list[int]
    accepted: int
    finished: bool
    failed: bool


class RecordQueue:
    """Records on their way to the host, the oldest first: the only place where a generation waits for the device."""

    def __init__(self, record_BR: Tensor, *, length: int) -> None:
        """Make room.

        Args:
            record_BR: the buffer that steps write.
            length: most records on their way at a time.
        """
        self._record_BR = record_BR
        self._on_cuda = record_BR.device.type == "cuda"
        self._free = deque(
            torch.empty(record_BR.shape, dtype=record_BR.dtype, pin_memory=self._on_cuda) for _ in range(length)
        )
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._waiting)

    def push(self) -> None:
        """Copy the buffer as it will be once everything that was asked of the device is done."""
        host_BR = self._free.popleft()
        host_BR.copy_(self._record_BR, non_blocking=self._on_cuda)
        event = None
        if self._on_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((host_BR, event))

    def pop(self, rows: int) -> list[RowRecord]:
        """Wait for the oldest record; its first `rows` rows."""
        host_BR, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(host_BR)
        return [
            RowRecord(tokens[:count], accepted, bool(flags & 1), bool(flags & FAILED))
            for *tokens, count, accepted, flags in host_BR[:rows].tolist()
        ]
