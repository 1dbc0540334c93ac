"""`headway convert`: one model layout to another, nothing dropped silently."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from headway.cli.console import DTYPES, counted, emit_json, note, quiet_libraries, show_facts, sized, torch_dtype
from headway.convert.names import EXPORTS, FORMATS
from headway.errors import ConfigError
from headway.heads.options import OPTIONS_OF, HeadOptions
from headway.provenance import provenance
from headway.training.fields import nearest, parse_text

if TYPE_CHECKING:
    from headway.convert.report import ConversionReport

HEAD_STARTS = ("copy", "fresh")


_FORMATS_TEXT = "; ".join(f"{name}: {what}" for name, what in (FORMATS | EXPORTS).items())


@click.command("convert", epilog=f"Formats: {_FORMATS_TEXT}. {' and '.join(EXPORTS)} are only written.")
@click.argument("source")
@click.argument("destination")
@click.option(
    "--from", "source_format", type=click.Choice([*FORMATS]), required=True, help="Format of SOURCE (listed below)."
)
@click.option(
    "--to", "target_format", type=click.Choice([*FORMATS, *EXPORTS]), required=True, help="Format of DESTINATION."
)
@click.option(
    "--num-future-tokens",
    "-n",
    type=click.IntRange(min=1),
    help="Tokens predicted per position in the result, the next one included. Fewer than in SOURCE drops the farthest "
    "heads, more adds heads that need training. Default: as in SOURCE.",
)
@click.option(
    "--heads",
    type=click.Choice([*OPTIONS_OF]),
    help="Architecture of the heads that a model without any gets. Default: transformer.",
)
@click.option(
    "--head-option",
    "head_options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An option of these heads, such as wiring=causal or blocks_per_head=2 (docs/guides/convert.md).",
)
@click.option(
    "--head-init",
    type=click.Choice(HEAD_STARTS),
    default="copy",
    show_default=True,
    help="How added heads start: from the base's own weights, or drawn at random.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of heads drawn at random.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights written. Default: as in SOURCE.")
@click.option(
    "--base",
    help="Folder or hub name of the plain base, where SOURCE holds heads alone. Default: the base that they name.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model that is in DESTINATION; its other files stay.")
@click.option(
    "--verify",
    is_flag=True,
    help="Load the result, compare every tensor, and the logits of every offset in float32; keep it only if equal. "
    "Takes the memory of the whole model.",
)
def convert_command(
    source: str,
    destination: str,
    source_format: str,
    target_format: str,
    num_future_tokens: int | None,
    heads: Any,
    head_options: tuple[str, ...],
    head_init: Any,
    seed: int,
    dtype: str | None,
    base: str | None,
    overwrite: bool,
    verify: bool,
) -> None:
    """Convert a model between headway, plain Hugging Face and other layouts.

    Reads the folder SOURCE and writes the folder DESTINATION, one tensor in memory at a time. Tokenizer, licence and
    model card travel along. Tensors that the result has no place for are an error that names them; what a format cannot
    hold exactly is refused with the reason. An interrupted conversion leaves nothing.
    """
    from headway.convert.convert import convert

    quiet_libraries()
    with _progress_bar() as progress:
        report = convert(
            source,
            destination,
            source_format=source_format,
            target_format=target_format,
            num_future_tokens=num_future_tokens,
            heads=heads,
            head_options=_head_options(head_options),
            head_init=head_init,
            seed=seed,
            dtype=None if dtype is None else torch_dtype(dtype),
            base=base,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )
    _show(report, destination)
    emit_json({"destination": Path(destination).name, **report.to_dict(), "provenance": provenance()})


def _head_options(given: tuple[str, ...]) -> dict[str, Any]:
    annotations = get_type_hints(HeadOptions)
    options: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--head-option takes NAME=VALUE: got {item!r}; write wiring=causal, say")
        if name not in annotations:
            raise ConfigError(f"there is no head option {name!r}; {nearest(name, annotations)}")
        options[name] = parse_text(text, annotations[name], where=f"--head-option {name}")
    return options


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: ConversionReport, destination: str) -> None:
    tensors = f"{counted(report.num_base_tensors)} of the base, {counted(report.num_head_tensors)} of heads"
    facts = [
        ("formats", f"{report.source_format} -> {report.target_format}"),
        ("base", f"{report.base_name or 'without a name'}, {report.model_type}"),
        ("future tokens", f"{report.source_num_future_tokens} -> {report.num_future_tokens}"),
        ("tensors", f"{tensors}; {sized(report.num_bytes)}, {report.dtype}"),
        ("travelled along", ", ".join(report.companions) or "nothing"),
    ]
    if report.left_behind:
        facts.append(("left behind", ", ".join(report.left_behind)))
    if report.left_out:
        facts.append(("left out", "; ".join(report.left_out)))
    if report.gguf_obstacles is not None:
        facts.append(("GGUF", "; ".join(report.gguf_obstacles) or "ready for llama.cpp's converter"))
    verification = report.verification
    if verification is not None:
        differences = ", ".join("new" if gap is None else f"{gap:.1e}" for gap in verification.max_abs_difference)
        facts += [
            ("verified", f"{verification.tensors_compared} tensors bit for bit, {verification.num_tokens} tokens"),
            ("largest difference", f"{differences} (per offset; limit {verification.limit:.1e})"),
            ("random heads", _heads(verification.random) or "none"),
            ("untrained", _heads(verification.unchanged) or "none"),
        ]
    show_facts(destination, facts)
    for line in report.notes:
        note(f"note: {line}")


def _heads(names: tuple[str, ...]) -> str:
    """Tensors of heads, counted by offset, since one head has a dozen; those of all offsets by their name."""
    counts: dict[str, int] = {}
    for name in names:
        numbered = re.match(r"(?:unembeddings\.)?(\d+)\.", name)
        where = f"offset {int(numbered[1]) + 2}" if numbered else f"all offsets, {name.partition('.')[0]}"
        counts[where] = counts.get(where, 0) + 1
    return ", ".join(
        f"{where} ({count} tensor{'s' if count > 1 else ''})"
        for where, count in sorted(counts.items(), key=lambda item: (len(item[0]), item[0]))
    )
