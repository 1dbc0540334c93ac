"""Weights as int8 with one scale per output: another model than the checkpoint, of fewer bytes.

Legend: O outputs, D inputs, P inputs padded to a multiple of 64.

Only weights are rounded to eight bits; what they are multiplied by keeps sixteen, with a scale per row, so that sums are whole
numbers and a row's result is the same bits on every machine (kernel/integers.hpp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.decoding.lean.pages import huge_pages

LARGEST = 127
_PADDING = 64
_CHUNK = 32 * 2**20


@dataclass(frozen=True)
class IntegerWeight:
    """A matrix; weight = scale x value.

    Attributes:
        values_OP: int8, padded with zeros.
        scales_O: float32.
        sums_O: int32, of each row's values.
        inputs: D.
    """

    values_OP: Tensor
    scales_O: Tensor
    sums_O: Tensor
    inputs: int

    @property
    def num_bytes(self) -> int:
        """Of values, scales and sums."""
        return self.values_OP.numel() + 8 * len(self.scales_O)

    def rows(self, begin: int, end: int) -> IntegerWeight:
        """Outputs begin .. end - 1, not copied."""
        return IntegerWeight(self.values_OP[begin:end], self.scales_O[begin:end], self.sums_O[begin:end], self.inputs)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [O, D] that the rounded model has."""
        return (self.values_OP[:, : self.inputs] * self.scales_O[:, None]).to(dtype)


class Quantizer:
    """Rounds maps to int8, each once, into memory in huge pages."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[nn.Linear, IntegerWeight]] = {}
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def __call__(self, linear: nn.Linear) -> IntegerWeight:
        """The rounded weight of a map."""
        known = self._known.get(id(linear))
        if known is None:
            known = self._known[id(linear)] = linear, self._quantize(linear.weight.detach())
        return known[1]

    def _quantize(self, weight_OD: Tensor) -> IntegerWeight:
        outputs, inputs = weight_OD.shape
        padded = -(-inputs // _PADDING) * _PADDING
        values_OP = self._take(outputs * padded).view(torch.int8).view(outputs, padded)
        scales_O = torch.empty(outputs)
        # Piece by piece: an unembedding in float32 would take four times what it takes here.
        for begin in range(0, outputs, 4096):
            wide = weight_OD[begin : begin + 4096].float()
            scales = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
            values_OP[begin : begin + 4096, :inputs] = (wide / scales[:, None]).round().to(torch.int8)
            scales_O[begin : begin + 4096] = scales
        return IntegerWeight(values_OP, scales_O, values_OP.sum(dim=1, dtype=torch.int32), inputs)

    def _take(self, size: int) -> Tensor:
        """Fresh memory, zero."""
        if size > len(self._chunk):
            self._chunk = huge_pages(max(size, _CHUNK))
        taken, self._chunk = self._chunk[:size], self._chunk[size:]
        return taken
