"""What a row gets from one block: as far as the draft stands, its end and its room allow."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from decoding_cases import VOCABULARY
from headway.decoding.choosing import Emission, GreedyChooser
from headway.decoding.history import History
from headway.decoding.scored import ScoredChooser
from headway.functional.acceptance import greedy_match

TARGET = [5, 6, 7, 8]
CASES = [
    # draft, room, end ids -> tokens, accepted, finished
    ([5, 6, 7], 9, (), Emission([5, 6, 7, 8], 3, finished=False)),
    ([5, 9, 7], 9, (), Emission([5, 6], 1, finished=False)),
    ([9, 6, 7], 9, (), Emission([5], 0, finished=False)),
    ([5, 6, 7], 4, (), Emission([5, 6, 7, 8], 3, finished=True)),
    ([5, 6, 7], 2, (), Emission([5, 6], 2, finished=True)),
    ([5, 6, 7], 9, (6,), Emission([5, 6], 2, finished=True)),
    ([5, 9, 7], 9, (6,), Emission([5, 6], 1, finished=True)),
    ([9, 6, 7], 9, (6,), Emission([5], 0, finished=False)),
    ([5, 6, 7], 9, (8, 7), Emission([5, 6, 7], 3, finished=True)),
    ([5, 6, 7], 1, (6,), Emission([5], 1, finished=True)),
    ([], 9, (5,), Emission([5], 0, finished=True)),
]


def _logits(rows):
    return F.one_hot(torch.tensor(rows), VOCABULARY).float()


def _scored(room, ends, batch=1, known=False):
    def criteria(ids, scores):
        return torch.tensor([int(row[-1]) in ends for row in ids])

    history = History(
        torch.ones(batch, 3, dtype=torch.long),
        max_new_tokens=room,
        pad_token_id=0,
        logits_processor=lambda ids, scores: scores,
        stopping_criteria=criteria,
        gate=None,
    )
    return ScoredChooser(
        history,
        rule=greedy_match,
        seeds=None,
        end_token_ids=frozenset(ends) if known else frozenset(),
        other_criteria=not known,
    )


@pytest.mark.parametrize(("draft", "room", "ends", "expected"), CASES)
def test_both_choosers_emit_what_stands_and_no_more(draft, room, ends, expected):
    block = torch.tensor([[1, *draft]])
    logits = _logits([TARGET[: len(draft) + 1]])
    assert GreedyChooser(frozenset(ends)).choose(logits, block, [room]) == [expected]
    for known in (False, True):
        assert _scored(room, ends, known=known).choose(logits, block, [room]) == [expected]


def test_a_finished_row_gets_nothing_and_rows_do_not_mix():
    block = torch.tensor([[1, 5, 6, 7], [1, 5, 6, 7], [1, 9, 6, 7]])
    logits = _logits([TARGET] * 3)
    expected = [Emission([5, 6, 7, 8], 3, finished=False), None, Emission([5], 0, finished=False)]
    assert GreedyChooser(frozenset()).choose(logits, block, [9, 0, 9]) == expected
    assert _scored(9, (), batch=3).choose(logits, block, [9, 0, 9]) == expected


def test_float64_logits_are_compared_in_float32_as_transformers_does():
    logits = torch.zeros(1, 1, VOCABULARY, dtype=torch.float64)
    logits[0, 0, 3], logits[0, 0, 9] = 1.0, 1.0 + 1e-12
    assert GreedyChooser(frozenset()).choose(logits, torch.tensor([[1]]), [5]) == [Emission([3], 0, finished=False)]
