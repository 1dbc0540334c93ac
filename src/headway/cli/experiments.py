"""`headway experiments`: studies that train several models and end in one table, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from headway.cli.console import emit_json, human_console, note, quiet_libraries

_EXIT_AFTER_SIGNAL = 128


class _Seeds(click.ParamType[Any]):
    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read `0,1,2`."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 0,1,2", param, ctx)


@click.group("experiments")
def experiments_group() -> None:
    """Train several models under equal conditions and compare them.

    Every experiment goes on where it was killed when the same command is given again, writes its figures, drawings and a
    page into its folder, and ends stdout with one JSON document.
    """


@experiments_group.command("heads")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the comparison. Default: out/heads (out/heads-smoke with --smoke).",
)
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Only this one; repeatable. Default: all.")
@click.option("--seeds", type=_Seeds(), default=(0, 1, 2), help="Comma-separated. Default: 0,1,2.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of every run. Default: 300.")
@click.option("--on-top", is_flag=True, help="Layers of heads come on top, instead of being taken from the trunk.")
@click.option(
    "--data", multiple=True, metavar="SOURCE", help="As in `headway train`; repeatable. Default: the standard library."
)
@click.option("--smoke", is_flag=True, help="Seconds: shows everything, learns nothing.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of one operation. Default: torch's choice.")
@click.option("--overwrite", is_flag=True, help="Delete an earlier comparison in the folder and begin anew.")
@click.option("--quiet", is_flag=True, help="Say what each run gave, not how it goes.")
@click.pass_context
def heads_command(
    context: click.Context,
    output: Path | None,
    variants: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int | None,
    on_top: bool,
    data: tuple[str, ...],
    smoke: bool,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Train every head architecture at equal steps on the same text, and decode with each.

    Small byte models with four future tokens, one per architecture and seed, see the same rows in the same order. Then,
    for each: held-out loss and loop-free acceptance per offset with their spread over seeds, the same with heads that were
    never trained, equality of drafted and plain decoding, correctness of the heads' caches, parameters, bytes read per
    step, and, all taking turns, tokens per second of training and decoding.

    Exit status 1 if any decoding was not lossless, any cache was wrong, or (but for --smoke) any head was no better than
    an untrained one.
    """
    from headway.experiments.heads.options import HeadsOptions
    from headway.experiments.heads.run import run_heads
    from headway.training.interruption import TrainingInterruptedError
    from headway.training.progress import TrainingProgress

    quiet_libraries()
    options = HeadsOptions(
        output=output,
        variants=variants,
        seeds=seeds,
        steps=steps,
        on_top=on_top,
        data=data or None,
        smoke=smoke,
        threads=threads,
        overwrite=overwrite,
    )
    try:
        finished = run_heads(options, say=note, on_event=None if quiet else TrainingProgress(human_console()))
    except TrainingInterruptedError as interruption:
        note(f"{interruption}; the same command goes on from there")
        context.exit(_EXIT_AFTER_SIGNAL + interruption.signal_number)
    note(f"report: {finished.report}")
    emit_json(finished.result.to_json() | {"report": str(finished.report)})
    if not (finished.result.sound and (smoke or finished.result.beats_untrained)):
        context.exit(1)
