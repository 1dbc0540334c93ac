"""Muon on several processes: every matrix is orthogonalised once, by one of them.

Legend: S matrices of one shape, R rows, C columns.

Orthogonalising needs the whole matrix. Where rows are sharded, each process sends its rows of a matrix to the matrix's
owner, who orthogonalises it whole and sends the rows back: two exchanges of the size of one process's shard, in bfloat16,
which is what the iteration begins with anyway. Where every process has whole matrices, owners send their results to all.
Either way the work is divided, and all processes apply the same bits.

Both ways are equal to one process: the same matrices go through the same iteration (`headway.training.muon`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Orthogonalize = Callable[[list[Tensor]], list[Tensor]]
"""Matrices of any shapes -> each orthogonalised, in bfloat16."""


def owners(shapes: Sequence[torch.Size], *, count: int) -> list[int]:
    """Which of `count` processes orthogonalises which matrix: the costliest first, each to who has least to do.

    A pure function of the shapes, so that nobody has to be told.

    >>> owners([torch.Size((4, 4)), torch.Size((8, 8)), torch.Size((4, 4))], count=2)
    [1, 0, 1]
    """
    costs = [shape[0] * shape[1] * min(shape) for shape in shapes]
    loads = [0] * count
    chosen = [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: (-costs[index], index)):
        chosen[index] = loads.index(min(loads))
        loads[chosen[index]] += costs[index]
    return chosen


class ReplicatedSharing:
    """For processes that all have the whole matrices, and the same ones."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Share among the processes of `group`."""
        self._group = group

    def __call__(self, updates: list[Tensor], orthogonalize: Orthogonalize) -> list[Tensor]:
        """Every update orthogonalised, in bfloat16; each process computes those that it owns."""
        count, rank = self._group.size(), self._group.rank()
        owner = owners([update.shape for update in updates], count=count)
        mine = orthogonalize([update for update, own in zip(updates, owner, strict=True) if own == rank])
        sizes = [sum(u.numel() for u, own in zip(updates, owner, strict=True) if own == each) for each in range(count)]
        # Equal shares, the smaller ones filled up: what every backend can gather.
        sent = torch.zeros(max(sizes), dtype=torch.bfloat16, device=updates[0].device)
        _pack(mine, into=sent)
        gathered = torch.empty(count * max(sizes), dtype=torch.bfloat16, device=sent.device)
        dist.all_gather_single(gathered.view(torch.uint8), sent.view(torch.uint8), group=self._group)
        results: list[Tensor] = []
        places = [each * max(sizes) for each in range(count)]
        for update, own in zip(updates, owner, strict=True):
            results.append(gathered[places[own] : places[own] + update.numel()].view(update.shape))
            places[own] += update.numel()
        return results


class ShardedSharing:
    """For processes that each have some rows of every matrix, as FSDP2 shards them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Share among the processes of `group`, over which the rows are sharded."""
        self._group = group

    def __call__(self, updates: list[Tensor], orthogonalize: Orthogonalize) -> list[Tensor]:
        """This process's rows of every update, orthogonalised, in bfloat16.

        Args:
            updates: DTensors sharded by rows.
            orthogonalize: for whole matrices.
        """
        count, rank = self._group.size(), self._group.rank()
        local = [own_rows(update) for update in updates]
        shapes = [update.shape for update in updates]
        owner = owners(shapes, count=count)
        by_owner = [[index for index, own in enumerate(owner) if own == each] for each in range(count)]
        there = self._exchange(
            [torch.cat([_flat(local[index]) for index in owned]) if owned else None for owned in by_owner],
            [
                sum(_rows(shapes[index], each, count) * shapes[index][1] for index in by_owner[rank])
                for each in range(count)
            ],
            like=local[0],
        )
        whole = orthogonalize(
            [torch.cat(parts) for parts in _unpack(there, [shapes[i] for i in by_owner[rank]], range(count), count)]
        )
        back = self._exchange(
            [
                torch.cat([_flat(_slice(matrix, each, count)) for matrix in whole]) if whole else None
                for each in range(count)
            ],
            [sum(local[index].numel() for index in owned) for owned in by_owner],
            like=local[0],
        )
        results = list(local)
        for owned, received in zip(by_owner, back, strict=True):
            place = 0
            for index in owned:
                results[index] = received[place : place + local[index].numel()].view(local[index].shape)
                place += local[index].numel()
        return results

    def _exchange(self, sent: list[Tensor | None], expected: list[int], *, like: Tensor) -> list[Tensor]:
        """Send item r to process r; get `expected[r]` numbers from each."""
        empty = torch.empty(0, dtype=torch.bfloat16, device=like.device)
        parts = [empty if part is None else part for part in sent]
        received = torch.empty(sum(expected), dtype=torch.bfloat16, device=like.device)
        # As bytes, which every backend moves.
        dist.all_to_all_single(
            received.view(torch.uint8),
            torch.cat(parts).view(torch.uint8),
            [2 * size for size in expected],
            [2 * part.numel() for part in parts],
            group=self._group,
        )
        return list(torch.split(received, expected))


def own_rows(tensor: Tensor) -> Tensor:
    """The rows that lie in this process; all of an ordinary tensor. The same memory, so that it can be written to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(shape: torch.Size, rank: int, count: int) -> int:
    """Rows of a process: FSDP2 cuts as `torch.chunk` does."""
    share = -(-shape[0] // count)
    return max(0, min(share, shape[0] - rank * share))


def _slice(matrix: Tensor, rank: int, count: int) -> Tensor:
    share = -(-matrix.shape[0] // count)
    return matrix[rank * share : rank * share + _rows(matrix.shape, rank, count)]


def _unpack(received: list[Tensor], shapes: list[torch.Size], ranks: Sequence[int], count: int) -> list[list[Tensor]]:
    """For each matrix its pieces in the order of ranks, out of one flat tensor per rank."""
    places = [0] * count
    matrices = []
    for shape in shapes:
        pieces = []
        for rank in ranks:
            rows = _rows(shape, rank, count)
            pieces.append(received[rank][places[rank] : places[rank] + rows * shape[1]].view(rows, shape[1]))
            places[rank] += rows * shape[1]
        matrices.append(pieces)
    return matrices


def _flat(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().flatten()


def _pack(tensors: list[Tensor], *, into: Tensor) -> None:
    place = 0
    for tensor in tensors:
        into[place : place + tensor.numel()].copy_(tensor.flatten())
        place += tensor.numel()
