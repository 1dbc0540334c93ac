import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import DataError
from headway.experiments.demo.blocks import END_OF_TEXT, REPLACEMENT, plain_text, printable, text_blocks


def test_blocks_carry_the_text_that_their_forward_gave():
    blocks = text_blocks(list(b"return self"), [1, 4, 2, 4])
    assert [block.text for block in blocks] == ["r", "etur", "n ", "self"]
    assert [block.forward for block in blocks] == [0, 1, 2, 3]
    assert [block.num_tokens for block in blocks] == [1, 4, 2, 4]


def test_a_character_belongs_to_the_forward_that_completed_it():
    euro = "\u20ac".encode()
    assert [block.text for block in text_blocks([*euro, 65], [2, 2])] == ["", "\u20acA"]


def test_bytes_cut_off_at_the_end_or_before_another_id_are_replaced_and_not_lost():
    assert plain_text([0xE2, 0x82]) == REPLACEMENT
    assert plain_text([0xE2, 256, 65]) == f"{REPLACEMENT}{END_OF_TEXT}A"


@given(st.lists(st.integers(0, 300), max_size=40), st.data())
def test_cutting_changes_nothing_and_no_character_moves_a_cursor(tokens, data):
    lengths, left = [], len(tokens)
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    joined = "".join(block.text for block in text_blocks(tokens, lengths))
    assert joined == plain_text(tokens)
    assert all(character == "\n" or character.isprintable() for character in joined)


def test_valid_text_is_kept_as_it_is():
    assert plain_text(list("caf\u00e9 \u4e2d\n".encode())) == "caf\u00e9 \u4e2d\n"


def test_direction_marks_and_c1_controls_are_replaced():
    assert printable("a\u202eb\x9bc") == f"a{REPLACEMENT}b{REPLACEMENT}c"


def test_lengths_of_another_generation_are_refused():
    with pytest.raises(DataError, match="same generation"):
        text_blocks([65, 66], [1])
