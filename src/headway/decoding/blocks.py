"""Generation watched block by block, for animations and for reports that show what each forward gave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.loop import DecodingLoop
from headway.decoding.statistics import GenerationResult


class BlockStream(Iterator[list[list[int]]]):
    """The forwards of one generation, one per `next`: the same loop as `generate`, run by whoever iterates.

    Each item has one list per row: the tokens that this forward gave it, empty once the row has ended. The first item
    is the prefill's. Nothing runs between two items, so the consumer may take its time, or stop and drop the stream.
    """

    def __init__(self, model: Any, loop: DecodingLoop) -> None:
        self._model = model
        self._modules = tuple(model.modules())
        self._loop = loop

    def __iter__(self) -> BlockStream:
        """Itself; a stream can be read once."""
        return self

    def __next__(self) -> list[list[int]]:
        """Run one forward.

        Raises:
            StopIteration: every row has ended.
        """
        if self._loop.finished:
            raise StopIteration
        with decoding_context(self._model, self._modules):
            return self._loop.step()

    @property
    def result(self) -> GenerationResult:
        """Sequences and statistics of what has been read so far; final once the stream is exhausted."""
        return self._loop.result()


def stream_blocks(
    model: Any, input_ids: Tensor | None = None, *, num_draft_tokens: int | str | None = None, **kwargs: Any
) -> BlockStream:
    """Generate, handing out the tokens of every forward as it happens.

    Equal to `model.generate(input_ids, ...)`: the concatenated items are its new tokens.

    Example::

        stream = stream_blocks(model, input_ids, attention_mask=mask, max_new_tokens=64)
        for block in stream:
            show(tokenizer.decode(block[0]))
        print(stream.result.acceptance.mean_acceptance_length)

    Args:
        model: a `MultiTokenLM`.
        input_ids: prompts [B, T].
        num_draft_tokens: as in `generate`.
        kwargs: as in `generate`; no streamer.

    Returns:
        An iterator over forwards with a `result`.

    Raises:
        DecodingError: a request that the engine does not serve.
    """
    return BlockStream(model, ENGINE.start(model, input_ids, num_draft_tokens=num_draft_tokens, **kwargs))
