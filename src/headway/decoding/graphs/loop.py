"""The decoding loop over captured steps: the host keeps books while the device is a step ahead.

Legend: B rows, M positions of a block, K drafted tokens.
"""

from __future__ import annotations

from typing import cast

from headway.decoding.choosing import Emission
from headway.decoding.drafting import Block
from headway.decoding.graphs.executor import GraphExecutor
from headway.decoding.graphs.state import RowRecord
from headway.decoding.loop import DecodingLoop
from headway.errors import DecodingError


class GraphLoop(DecodingLoop):
    """`DecodingLoop` whose executor is a `GraphExecutor`, which chooses and drafts by itself.

    Tokens, statistics and streaming are those of the loop that runs step by step: what a step would have drafted less, near
    a limit, does not count as drafted here either.
    """

    @property
    def graphs(self) -> GraphExecutor:
        """The executor."""
        return cast(GraphExecutor, self.executor)

    def step(self) -> list[list[int]]:
        """Read what one forward gave, the first being the prefill; further ones are asked for before.

        Returns:
            Per row the tokens that it emitted; empty for a row that had ended before.

        Raises:
            DecodingError: a token could not be drawn.
        """
        run = self.graphs
        first = not self.rows[0]
        if first:
            run.begin()
        else:
            self._launch()
        width = 0 if first else min(self.num_draft_tokens, max(self._rooms) - 1)
        emissions = [
            self._emission(record, width) if room else None
            for record, room in zip(run.read(), self._rooms, strict=True)
        ]
        self._commit(emissions, Block(self.prompts.ids_BP[:, :1]))
        run.done = self.finished
        self._stream()
        return [emission.tokens if emission else [] for emission in emissions]

    def _launch(self) -> None:
        run = self.graphs
        live = [position for position, room in zip(self._positions, self._rooms, strict=True) if room]
        # A row that goes on gets a token from every step, so no more can be needed than the rooms are long.
        while run.in_flight < min(1 + run.ahead, max(self._rooms)):
            run.launch(live)

    def _emission(self, record: RowRecord, width: int) -> Emission:
        if record.failed:
            raise DecodingError(
                "cannot draw a token: its weights are not finite or sum to 0; logits must be finite somewhere"
            )
        drafted = min(width, len(record.tokens))
        return Emission(record.tokens, min(record.accepted, drafted), record.finished, drafted=drafted)
