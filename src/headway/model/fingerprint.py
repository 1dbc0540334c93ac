"""A fingerprint of a base model's weights, by which heads recognise the base that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def weights_fingerprint(tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """sha256 over names, shapes and values of all tensors, in the order of their names.

    Args:
        tensors: a state dict.
        dtype: round values to this type first, so that copies of a model in different precisions agree.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _update(digest, name, tensors[name], dtype)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
    flat = tensor.cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


class FingerprintBuilder:
    """`base_fingerprint` of tensors that pass by one at a time, for models that are never in memory as a whole."""

    def __init__(self) -> None:
        self._exact = hashlib.sha256()
        self._rounded = hashlib.sha256()
        self._dtypes: set[torch.dtype] = set()
        self._last = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor: names must come sorted, tied repetitions left out.

        Raises:
            ValueError: a name out of order.
        """
        if name <= self._last:
            raise ValueError(f"tensors must come in the order of their names: got {name!r} after {self._last!r}")
        self._last = name
        self._dtypes.add(tensor.dtype)
        _update(self._exact, name, tensor, None)
        _update(self._rounded, name, tensor, torch.bfloat16)

    def fingerprint(self) -> dict[str, str]:
        """What `mtp/config.json` records of the tensors so far."""
        return {
            "dtype": _dtype_names(self._dtypes),
            "sha256": self._exact.hexdigest(),
            "sha256_bfloat16": self._rounded.hexdigest(),
        }


def base_fingerprint(base: Any, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """What `mtp/config.json` records of a base: its exact weights, and their bfloat16 rounding for other precisions."""
    tensors = untied_tensors(base, state_dict)
    builder = FingerprintBuilder()
    for name in sorted(tensors):
        builder.add(name, tensors[name])
    return builder.fingerprint()


def same_fingerprint(recorded: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of one base, exactly where precisions agree, else after rounding to bfloat16."""
    if recorded.get("dtype") == other.get("dtype"):
        return recorded.get("sha256") == other.get("sha256")
    return recorded.get("sha256_bfloat16") == other.get("sha256_bfloat16")


def same_base(recorded: Mapping[str, str], base: Any) -> bool:
    """Whether `base` is the recorded one, exactly where precisions agree, else after rounding both to bfloat16."""
    return same_tensors(recorded, untied_tensors(base, base.state_dict()))


def same_tensors(recorded: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """`same_base` for the base's tensors, tied repetitions left out."""
    if dtype_names(tensors) == recorded.get("dtype"):
        return weights_fingerprint(tensors) == recorded.get("sha256")
    return weights_fingerprint(tensors, dtype=torch.bfloat16) == recorded.get("sha256_bfloat16")


def untied_tensors(base: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the names that only repeat another tensor (tied unembeddings)."""
    repeated = getattr(base, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if name not in repeated}


def dtype_names(tensors: Mapping[str, Tensor]) -> str:
    """The types of tensors in words, as a fingerprint records them."""
    return _dtype_names({tensor.dtype for tensor in tensors.values()})


def _dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return ",".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
