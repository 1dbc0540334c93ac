"""consolidated.*.pth: one file, or one per model-parallel rank of Meta's trainer.

Ranks hold slices: of the output rows of wq, wk, wv, w1, w3 and output, of the input columns of wo and w2, of the width
of the embedding (Llama 2) or of its rows (Llama 3). Norms are repeated on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from headway.convert.facebook.params import FacebookParams
from headway.convert.lazy_model import LazyTensor
from headway.convert.torch_files import open_torch_file
from headway.errors import CheckpointError

PATTERN = "consolidated.*.pth"

_BY_ROWS = re.compile(r"(?:attention\.w[qkv]|feed_forward\.w[13]|^output)\.weight$")
_BY_COLUMNS = re.compile(r"(?:attention\.wo|feed_forward\.w2)\.weight$")
_EMBEDDING = "tok_embeddings.weight"


def open_shards(folder: Path, params: FacebookParams) -> dict[str, LazyTensor]:
    """The whole tensors by Meta's names, put together from the ranks' slices when they are read.

    Raises:
        CheckpointError: no files, a rank missing, ranks that disagree.
    """
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        other = sorted(path.name for path in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{folder} has no {PATTERN}"
            + (f"; it has {other[0]}: is it a Hugging Face folder (--from hf)?" if other else ": it is half written"),
            path=folder,
        )
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    if [path.name for path in paths] != expected:
        raise CheckpointError(
            f"{folder} must have its ranks numbered without a gap: got {', '.join(path.name for path in paths)}; restore "
            f"the missing files",
            path=folder,
        )
    ranks = [open_torch_file(path) for path in paths]
    for path, rank in zip(paths, ranks, strict=True):
        if rank.keys() != ranks[0].keys():
            odd = sorted(rank.keys() ^ ranks[0].keys())
            raise CheckpointError(
                f"{paths[0].name} and {path.name} are not ranks of one model: they differ in {len(odd)} tensors (first: "
                f"{odd[0]}); restore them",
                path=path,
            )
    if len(ranks) == 1:
        return ranks[0]
    return {name: _join(name, [rank[name] for rank in ranks], params, folder) for name in ranks[0]}


def _join(name: str, slices: Sequence[LazyTensor], params: FacebookParams, folder: Path) -> LazyTensor:
    axis = _axis(name, slices[0], params)
    if axis is None:
        return _repeated(name, slices, folder) if len(slices[0].shape) == 1 else slices[0]
    shape = list(slices[0].shape)
    odd = [part for part in slices if part.dtype != slices[0].dtype or len(part.shape) != len(shape)]
    if odd or any(part.shape[1 - axis] != shape[1 - axis] for part in slices):
        raise CheckpointError(f"the ranks in {folder} do not fit together at {name}; restore them", path=folder)
    shape[axis] = sum(part.shape[axis] for part in slices)
    return replace(
        slices[0], shape=tuple(shape), read=lambda: torch.cat([part.read() for part in slices], dim=axis).contiguous()
    )


def _axis(name: str, part: LazyTensor, params: FacebookParams) -> int | None:
    if len(part.shape) != 2:
        return None
    if _BY_ROWS.search(name):
        return 0
    if _BY_COLUMNS.search(name):
        return 1
    if name == _EMBEDDING:
        return 0 if part.shape[1] == params.dim else 1
    return None


def _repeated(name: str, slices: Sequence[LazyTensor], folder: Path) -> LazyTensor:
    first = slices[0].read()
    for rank, part in enumerate(slices):
        if part.shape != slices[0].shape or not torch.equal(part.read(), first):
            raise CheckpointError(
                f"{name} must be the same on every rank of {folder}: ranks 0 and {rank} differ; restore them",
                path=folder,
            )
    return slices[0]
