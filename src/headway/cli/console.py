"""What the commands print: human text on stderr, one JSON document on stdout.

rich and torch are imported only when something is shown or a dtype is needed, so that help stays fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "float16", "float64")
WIDTH_WITHOUT_TERMINAL = 110


def human_console() -> Console:
    """A rich console on stderr, wide enough for tables where no terminal says its width; no markup."""
    from rich.console import Console

    width = None if sys.stderr.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(stderr=True, highlight=False, markup=False, width=width)


def show_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print a title and aligned `name  value` lines on stderr."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(f"  {name}", style="dim"), value)
    console = human_console()
    console.print(Text(title, style="bold"))
    console.print(table)


def note(message: str) -> None:
    """Print one line on stderr."""
    click.echo(message, err=True)


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document as a line of stdout; NaN and infinities become null."""
    from headway.evaluation.json_ready import json_ready

    click.echo(json.dumps(json_ready(dict(document)), allow_nan=False))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of `DTYPES`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def counted(number: int) -> str:
    """A count a person can read at a glance.

    >>> counted(999), counted(30_123_456), counted(1_500_000_000)
    ('999', '30.12 M', '1.50 B')
    """
    return _scaled(number, 1000, ("", " k", " M", " B", " T"))


def sized(number_of_bytes: int) -> str:
    """Bytes in binary units.

    >>> sized(512), sized(40960), sized(3 * 2**30)
    ('512 B', '40.00 KiB', '3.00 GiB')
    """
    return _scaled(number_of_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    if number < base:
        return f"{number}{units[0]}"
    value = float(number)
    for unit in units[1:]:
        value /= base
        if value < base or unit == units[-1]:
            break
    return f"{value:.2f}{unit}"


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice off the screen of a command; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
