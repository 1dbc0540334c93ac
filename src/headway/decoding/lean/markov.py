"""The Markov bias by our C++ kernel: its product, and the likeliest chain of a draft in one call.

Legend: K drafted tokens, B rows, X nodes, V vocabulary, R rank.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from headway.decoding.lean.linear import FusedLinear
from headway.decoding.lean.native import library
from headway.heads.markov import MarkovBias


class ChainFields(ctypes.Structure):
    """`Chain` of kernel/chain.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "previous", "to_logits", "last", "tokens")),
        *((name, ctypes.c_int64) for name in ("count", "batch", "vocabulary", "rank", "threads")),
    ]


class LeanMarkov:
    """`MarkovBias` for decoding."""

    def __init__(self, markov: MarkovBias) -> None:
        """Read its weights, for which there is a kernel."""
        self._previous_VR = markov.previous.weight.detach().contiguous()
        self._to_logits_VR = markov.to_logits.weight.detach().contiguous()
        self._product = FusedLinear([markov.to_logits], way="kernel")
        found = library()
        assert found is not None
        wide = self._to_logits_VR.dtype == torch.float32
        self._chain = found.headway_chain_float32 if wide else found.headway_chain_bfloat16

    def __call__(self, tokens: Tensor) -> Tensor:
        """What real tokens [...] add to the next offset's logits [..., V]."""
        return self._product(self._previous_VR[tokens])

    def likeliest(self, logits_KBV: Tensor, last_B: Tensor) -> Tensor:
        """The tokens that a draft takes when every offset takes its likeliest: int64 [B, K].

        Args:
            logits_KBV: of the offsets, before the bias.
            last_B: the token before the first of them.
        """
        count, batch, vocabulary = logits_KBV.shape
        logits_KBV, last_B = logits_KBV.contiguous(), last_B.contiguous()
        tokens_BK = last_B.new_empty(batch, count)
        call = self.fields()
        call.logits, call.last, call.tokens = logits_KBV.data_ptr(), last_B.data_ptr(), tokens_BK.data_ptr()
        call.count, call.batch, call.vocabulary, call.threads = count, batch, vocabulary, torch.get_num_threads()
        self._chain(ctypes.addressof(call))
        return tokens_BK

    def fields(self) -> ChainFields:
        """What of a chain's fields is the bias's own."""
        previous, to_logits = self._previous_VR.data_ptr(), self._to_logits_VR.data_ptr()
        return ChainFields(previous=previous, to_logits=to_logits, rank=self._previous_VR.shape[1])
