import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.functional.repetition import distinct_ngrams


def test_a_loop_has_as_many_distinct_ngrams_as_its_period():
    assert distinct_ngrams([[1, 2, 3] * 100], size=8) == pytest.approx(3 / 293)


def test_text_without_repetition_is_all_distinct():
    assert distinct_ngrams([range(100), range(200, 300)]) == 1.0


def test_ngrams_shared_by_two_sequences_count_once():
    assert distinct_ngrams([range(20), range(20)]) == 0.5


def test_sequences_shorter_than_the_ngram_give_nan():
    assert math.isnan(distinct_ngrams([[1, 2, 3]], size=8))
    assert math.isnan(distinct_ngrams([], size=8))


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4), st.integers(1, 4))
def test_the_share_equals_its_definition_and_never_crosses_sequences(sequences, size):
    grams = [tuple(s[i : i + size]) for s in sequences for i in range(len(s) - size + 1)]
    share = distinct_ngrams(sequences, size=size)
    assert (math.isnan(share) and not grams) or share == len(set(grams)) / len(grams)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        distinct_ngrams([[1]], size=0)
