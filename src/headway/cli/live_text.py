"""Generated tokens as text while they come, each marked with the forward pass that gave it.

On a terminal with colours neighbouring forward passes have different backgrounds; elsewhere (a pipe, `NO_COLOR`, a dumb
terminal) each stands between square brackets.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from typing import Any

import click

from headway.data.tokenizers import BYTE_EOS_ID, is_byte_tokenizer
from headway.experiments.demo.blocks import printable
from headway.experiments.demo.side_by_side import BLOCK_STYLES

# Of the prompt, tokens that are decoded with the text so that a first token keeps its leading blank.
_CONTEXT_TOKENS = 8
# A model that emits bytes which never become a character is shown U+FFFD after so many tokens.
_MOST_HELD_TOKENS = 8


class TextDecoder:
    """Turns token ids into text piece by piece, never cutting a character.

    The pieces add up to the tokenizer's own decoding of all new tokens, special tokens left out.

    Args:
        tokenizer: of the model.
        prompt_ids: what comes before the first new token.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace") if is_byte_tokenizer(tokenizer) else None
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._shown_from, self._shown_to = 0, len(self._ids)

    def feed(self, ids: Sequence[int], *, final: bool = False) -> str:
        """Text that these tokens complete; with `final`, also what no later token will complete."""
        if self._bytes is not None:
            return self._bytes.decode(bytes(token for token in ids if token < BYTE_EOS_ID), final=final)
        self._ids += ids
        before = self._decode(self._ids[self._shown_from : self._shown_to])
        after = self._decode(self._ids[self._shown_from :])
        held = len(self._ids) - self._shown_to
        if after.endswith("\ufffd") and held <= _MOST_HELD_TOKENS and not final:
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class LiveText:
    """Writes the text of one generation to stdout as its forward passes come.

    Args:
        decoder: of this generation.
        show_blocks: mark which forward pass gave what.
    """

    def __init__(self, decoder: TextDecoder, *, show_blocks: bool) -> None:
        from rich.console import Console

        self._decoder = decoder
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._terminal = sys.stdout.isatty()
        self._show_blocks = show_blocks
        self._coloured = (
            show_blocks and self._console.is_terminal and not (self._console.no_color or self._console.is_dumb_terminal)
        )
        self._forwards = 0
        self._pieces: list[str] = []
        self._at_line_start = True

    @property
    def text(self) -> str:
        """All text so far, without marks."""
        return "".join(self._pieces)

    def block(self, ids: Sequence[int]) -> None:
        """Write what one forward pass gave."""
        self._write(self._decoder.feed(ids))
        self._forwards += 1

    def end(self) -> None:
        """Write what was held back, and end the line."""
        rest = self._decoder.feed([], final=True)
        if rest:
            self._write(rest)
        if not self._at_line_start:
            click.echo()
            self._at_line_start = True

    def _write(self, text: str) -> None:
        self._pieces.append(text)
        # A model may emit anything; on a terminal nothing that it emits shall be obeyed.
        shown = printable(text) if self._terminal else text
        if self._coloured:
            from rich.text import Text

            style = BLOCK_STYLES[self._forwards % len(BLOCK_STYLES)]
            # A line feed has no background of its own: a marked blank stands for it.
            self._console.print(Text(shown.replace("\n", " \n"), style=style), end="")
        else:
            shown = f"[{shown}]" if self._show_blocks else shown
            click.echo(shown, nl=False)
        sys.stdout.flush()
        if shown:
            self._at_line_start = shown.endswith("\n")
