"""The greedy acceptance rule is "count until the first draft the model would not have chosen"."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.functional.acceptance import accept_greedy_chain


@given(st.data())
def test_it_equals_feeding_the_tokens_one_by_one(data):
    batch = data.draw(st.integers(1, 4))
    drafted = data.draw(st.integers(0, 5))
    tokens = st.integers(0, 2)
    draft = [[data.draw(tokens) for _ in range(drafted)] for _ in range(batch)]
    target = [[data.draw(tokens) for _ in range(drafted + 1)] for _ in range(batch)]
    expected = []
    for proposals, choices in zip(draft, target, strict=True):
        count = 0
        while count < drafted and proposals[count] == choices[count]:
            count += 1
        expected.append(count)
    found = accept_greedy_chain(torch.tensor(draft).reshape(batch, drafted), torch.tensor(target))
    assert found.tolist() == expected
    assert found.dtype == torch.long


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4)])
def test_targets_that_do_not_belong_to_the_draft_are_refused(shape):
    with pytest.raises(ValueError, match="K \\+ 1 targets"):
        accept_greedy_chain(torch.zeros(2, 3), torch.zeros(shape))
