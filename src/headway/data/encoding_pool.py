"""Worker processes that encode pieces of text, with the results in order."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from headway.data.encoding import DocumentEncoder, Piece
from headway.data.encoding_worker import DEFINITION, PICKLE, read_frame, write_frame
from headway.errors import DataError

POOL_FROM_BYTES = 1 << 24
"""Less text than this is encoded by the calling process: starting workers would take longer."""

_BATCHES_PER_WORKER = 2

Encoded = tuple[npt.NDArray[Any], Piece]


def encode_in_order(
    batches: Iterable[Sequence[Piece]], encoder: DocumentEncoder, *, workers: int
) -> Iterator[list[Encoded]]:
    """The ids of each piece, batch by batch in the order given, whatever the number of workers.

    Bytes are encoded by the calling process: sending them would take longer.

    Args:
        batches: read a few ahead of what has been given back.
        encoder: of the tokenizer.
        workers: processes; fewer than two, and the calling process does all.

    Raises:
        DataError: a worker ended.
    """
    batches = iter(batches)
    if workers < 2 or encoder.is_bytes or not sys.executable:
        yield from (_here(batch, encoder) for batch in batches)
        return
    first, size = [], 0
    for batch in batches:
        first.append(batch)
        size += sum(len(piece.data) for piece in batch)
        if size >= POOL_FROM_BYTES:
            break
    else:
        yield from (_here(batch, encoder) for batch in first)
        return
    with _EncoderPool(encoder, workers) as pool:
        waiting: deque[tuple[Sequence[Piece], Future[list[npt.NDArray[Any]]]]] = deque()
        for batch in chain(first, batches):
            waiting.append((batch, pool.submit([piece.data for piece in batch if not piece.is_tokens])))
            if len(waiting) > _BATCHES_PER_WORKER * workers:
                yield _joined(*waiting.popleft())
        while waiting:
            yield _joined(*waiting.popleft())


def _here(batch: Sequence[Piece], encoder: DocumentEncoder) -> list[Encoded]:
    return _merged(batch, encoder.encode([piece.data for piece in batch if not piece.is_tokens]))


def _joined(batch: Sequence[Piece], future: Future[list[npt.NDArray[Any]]]) -> list[Encoded]:
    return _merged(batch, future.result())


def _merged(batch: Sequence[Piece], encoded: Sequence[npt.NDArray[Any]]) -> list[Encoded]:
    texts = iter(encoded)
    return [(piece.tokens() if piece.is_tokens else next(texts), piece) for piece in batch]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    has_tokenizer: bool = False


class _EncoderPool:
    """Processes of `headway.data.encoding_worker`, each served by a thread of this one.

    They are started as programs of their own, not by `multiprocessing`: that would run the caller's script again.
    """

    def __init__(self, encoder: DocumentEncoder, workers: int) -> None:
        if encoder.definition is not None:
            self._tokenizer = [DEFINITION, encoder.definition.encode()]
        else:
            self._tokenizer = [PICKLE, pickle.dumps(encoder.tokenizer)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._processes = [self._start() for _ in range(workers)]
        for process in self._processes:
            self._idle.put(_Worker(process))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encoding")

    def __enter__(self) -> _EncoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):  # what a killed worker left unread
                        stream.close()
            process.wait()

    def submit(self, pieces: list[bytes]) -> Future[list[npt.NDArray[Any]]]:
        """Encode pieces in the next worker that is idle."""
        return self._threads.submit(self._encode, pieces)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "headway.data.encoding_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # one thread each: the processes are what uses the cores
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"},
        )

    def _encode(self, pieces: list[bytes]) -> list[npt.NDArray[Any]]:
        worker = self._idle.get()
        answer = None
        try:
            source, target = cast(BinaryIO, worker.process.stdout), cast(BinaryIO, worker.process.stdin)
            if not worker.has_tokenizer:
                write_frame(target, self._tokenizer)
                worker.has_tokenizer = True
            write_frame(target, pieces)
            answer = read_frame(source)
        except OSError:  # a pipe without a reader
            answer = None
        finally:
            self._idle.put(worker)
        if answer is None:
            raise DataError(
                f"a worker process that encodes text ended (exit status {worker.process.poll()}; killed for memory, "
                f"perhaps); start again with fewer workers, or with none"
            )
        return [np.frombuffer(ids, dtype="<u4") for ids in answer]
