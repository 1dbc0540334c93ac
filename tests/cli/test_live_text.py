"""Text while it comes: whole characters, true colours, and nothing that a terminal would obey."""

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.cli.live_text import LiveText, TextDecoder
from headway.data.tokenizers import byte_tokenizer, decode_bytes

BYTES = byte_tokenizer()
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def write(blocks: list[list[int]], *, show_blocks: bool) -> str:
    live = LiveText(TextDecoder(BYTES, []), show_blocks=show_blocks)
    for block in blocks:
        live.block(block)
    live.end()
    return live.text


def decoded_in_pieces(tokenizer: Any, prompt: list[int], blocks: list[list[int]]) -> str:
    decoder = TextDecoder(tokenizer, prompt)
    return "".join(decoder.feed(block) for block in blocks) + decoder.feed([], final=True)


@given(st.lists(st.lists(st.integers(0, 257), max_size=5), max_size=12))
def test_pieces_of_bytes_add_up_to_the_decoding_of_all(blocks: list[list[int]]):
    together = [token for block in blocks for token in block]
    assert decoded_in_pieces(BYTES, [65], blocks) == decode_bytes(together)


@settings(deadline=None)
@given(st.data())
def test_pieces_of_text_add_up_to_the_decoding_of_all(text_tokenizer: Any, data: st.DataObject):
    text = data.draw(st.text("caf\u00e9 \u4f60\u597d\n\txyz3=+", max_size=30))
    ids = text_tokenizer(text)["input_ids"]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    edges = [0, *cuts, len(ids)]
    blocks = [ids[start:stop] for start, stop in pairwise(edges)]
    assert decoded_in_pieces(text_tokenizer, text_tokenizer("The")["input_ids"], blocks) == text


def test_a_character_is_shown_when_its_last_byte_has_come():
    decoder = TextDecoder(BYTES, [])
    euro = list("\u20ac".encode())
    assert [decoder.feed([byte]) for byte in euro] == ["", "", "\u20ac"]


def test_tokens_that_never_become_a_character_are_not_held_for_ever(text_tokenizer: Any):
    broken = text_tokenizer.convert_tokens_to_ids("\u00e9")  # stands for the byte 0xe9, which starts three
    decoder = TextDecoder(text_tokenizer, [])
    assert "".join(decoder.feed([broken]) for _ in range(20)) != ""


def test_special_tokens_are_no_text():
    assert decoded_in_pieces(BYTES, [], [[97, 256], [257, 98]]) == "ab"


def test_text_without_blocks_is_written_as_it_is(capsys: pytest.CaptureFixture[str]):
    assert write([[97], [98, 99]], show_blocks=False) == "abc"
    assert capsys.readouterr().out == "abc\n"


def test_a_text_that_ends_its_line_gets_no_second_line_feed(capsys: pytest.CaptureFixture[str]):
    write([[97, 10]], show_blocks=False)
    assert capsys.readouterr().out == "a\n"


def test_an_empty_text_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]):
    write([[256]], show_blocks=False)
    assert capsys.readouterr().out == ""


def test_neighbouring_blocks_have_different_colours_on_a_terminal(open_terminal):
    terminal = open_terminal()
    write([[97], [98, 99], [100]], show_blocks=True)
    shown = terminal.getvalue()
    assert ANSI.sub("", shown) == "abcd\n"
    colours = [re.search(r"(\x1b\[[0-9;]*m)" + text, shown) for text in ("a", "bc", "d")]
    codes = [match[1] for match in colours if match]
    assert len(codes) == 3
    assert len(set(codes)) == 3


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_brackets_replace_colours_where_none_are_wanted(open_terminal, name: str, value: str):
    terminal = open_terminal(**{name: value})
    write([[97], [98, 99]], show_blocks=True)
    assert terminal.getvalue() == "[a][bc]\n"


@pytest.mark.parametrize("show_blocks", [False, True])
def test_a_terminal_obeys_nothing_that_a_model_says(open_terminal, show_blocks: bool):
    terminal = open_terminal()
    write([list(b"a\x1b]0;title\x07\x1b[2J"), list(b"\rb\x08")], show_blocks=show_blocks)
    shown = ANSI.sub("", terminal.getvalue())
    assert "title" in shown
    assert not any(character in shown for character in "\x1b\x07\r\x08")


def test_long_lines_are_not_broken_by_the_width_of_a_terminal(open_terminal):
    terminal = open_terminal()
    write([[97] * 200, [98] * 200], show_blocks=True)
    assert ANSI.sub("", terminal.getvalue()) == "a" * 200 + "b" * 200 + "\n"
