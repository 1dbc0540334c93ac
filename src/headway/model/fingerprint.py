"""A fingerprint of a base model's weights, by which heads recognise the base that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
        tensor = tensors[name].detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        flat = tensor.cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_fingerprint(base: Any, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """What `mtp/config.json` records of a base: its exact weights, and their bfloat16 rounding for other precisions."""
    tensors = untied_tensors(base, state_dict)
    return {
        "dtype": _dtypes(tensors),
        "sha256": weights_fingerprint(tensors),
        "sha256_bfloat16": weights_fingerprint(tensors, dtype=torch.bfloat16),
    }


def same_base(recorded: Mapping[str, str], base: Any) -> bool:
    """Whether `base` is the recorded one, exactly where precisions agree, else after rounding both to bfloat16."""
    tensors = untied_tensors(base, base.state_dict())
    if _dtypes(tensors) == recorded.get("dtype"):
        return weights_fingerprint(tensors) == recorded.get("sha256")
    return weights_fingerprint(tensors, dtype=torch.bfloat16) == recorded.get("sha256_bfloat16")


def untied_tensors(base: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the names that only repeat another tensor (tied unembeddings)."""
    repeated = getattr(base, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if name not in repeated}


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    return ",".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
