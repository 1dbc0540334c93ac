"""Rotary position embeddings in the layout of Hugging Face's llama-like families.

Legend: d width of a head, r rotated part of it, r <= d.

Source: Su et al. 2021 (arXiv:2104.09864), section 3.4.2; the halves are rotated against each other, not neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed_sine(sin: Tensor) -> Tensor:
    """The sines with their first half negated, so that `rotate` needs no negation of its own.

    >>> signed_sine(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([-1., -2.,  3.,  4.])
    """
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """X cos + (x with its halves exchanged, the new first one negated) sin, over the first r of d; the rest passes.

    Args:
        x: [..., d].
        cos: [..., r], broadcast against x.
        signed_sin: `signed_sine` of the sines.

    Returns:
        [..., d] in x's dtype.
    """
    rotated = cos.shape[-1]
    if rotated == x.shape[-1]:
        half = rotated // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return (x * cos + swapped * signed_sin).to(x.dtype)
    return torch.cat((rotate(x[..., :rotated], cos, signed_sin), x[..., rotated:]), dim=-1)
