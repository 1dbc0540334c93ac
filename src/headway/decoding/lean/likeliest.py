"""The likeliest draft of heads that share the unembedding, by our C++ kernel in one call.

Legend: K drafted tokens, B rows, M positions of a pass, D width, V vocabulary.

Equal to `EagerExecutor.draft`: the final norm where heads use it, the unembedding, the Markov bias where there is one, and the
arg max of one offset after the other. Only the position that each row's draft begins at is read. For a model of ten million
parameters the same in separate calls took a sixth of a forward with drafts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from headway.decoding.lean.few_rows import MatrixFields
from headway.decoding.lean.integers import IntegerWeight
from headway.decoding.lean.layer import RMSNorm
from headway.decoding.lean.markov import ChainFields, LeanMarkov
from headway.decoding.lean.native import library


class _Draft(ctypes.Structure):
    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("unembedding", MatrixFields),
        ("chain", ChainFields),
        ("positions", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class LikeliestDraft:
    """Hidden states of the heads -> tokens."""

    def __init__(
        self,
        unembedding: tuple[Tensor | IntegerWeight, Tensor | None],
        *,
        norm: RMSNorm | None,
        markov: LeanMarkov | None,
    ) -> None:
        """Point at weights, for which there is a kernel.

        Args:
            unembedding: [V, D] and a bias or none.
            norm: before it, where the heads use one; it rounds before it multiplies.
            markov: the bias of the previous token, where there is one.
        """
        found = library()
        assert found is not None
        self._kept = unembedding, norm, markov
        weight_VD = unembedding[0]
        assert isinstance(weight_VD, Tensor)
        self._function = (
            found.headway_draft_float32 if weight_VD.dtype == torch.float32 else found.headway_draft_bfloat16
        )
        self._call = _Draft(unembedding=MatrixFields.of(*unembedding), width=weight_VD.shape[1])
        if norm is not None:
            self._call.norm, self._call.eps = norm.weight.data_ptr(), norm.eps
        if markov is not None:
            self._call.chain = markov.fields()
        self._call.chain.vocabulary = weight_VD.shape[0]

    def __call__(self, future: Sequence[Tensor], columns: Sequence[int], last_B: Tensor | None) -> Tensor:
        """The draft after one position of each row: int64 [B, K].

        Args:
            future: per offset from 2 on what its head gave [B, M, D].
            columns: per row the position that its draft begins at.
            last_B: the token after it, which a Markov bias reads.
        """
        future = [hidden_BMD.contiguous() for hidden_BMD in future]
        batch, positions, _ = future[0].shape
        device = future[0].device
        last_B = torch.zeros(batch, dtype=torch.long, device=device) if last_B is None else last_B.contiguous()
        tokens_BK = torch.empty(batch, len(future), dtype=torch.long, device=device)
        addresses = (ctypes.c_void_p * len(future))(*(hidden_BMD.data_ptr() for hidden_BMD in future))
        places = (ctypes.c_int64 * batch)(*columns)
        call = _Draft.from_buffer_copy(self._call)
        call.hidden, call.columns = ctypes.addressof(addresses), ctypes.addressof(places)
        call.positions = positions
        chain = call.chain
        chain.last, chain.tokens = last_B.data_ptr(), tokens_BK.data_ptr()
        chain.count, chain.batch, chain.threads = len(future), batch, torch.get_num_threads()
        self._function(ctypes.addressof(call))
        return tokens_BK
