"""`headway demo`: the main job on the embedded default, from text to report."""

from __future__ import annotations

import time
from pathlib import Path

import click

from headway.cli.console import emit_json, human_console, note, quiet_libraries


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the demo. Default: out/demo (out/demo-quick with --quick), made new by every demo.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo in the folder named by --output.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps. Default: the recipe's.")
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: shows everything, learns next to nothing.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of initial weights and data order."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of one operation. Default: torch's choice.")
def demo_command(
    output: Path | None, overwrite: bool, steps: int | None, quick: bool, seed: int, threads: int | None
) -> None:
    """Train a small byte model here and now, and compare its decoding.

    First the reference model of headway's repository races with itself, plain against self-speculative (not with --quick).
    The text is the standard library of the running Python, whole packages held out. A model with four future tokens is
    trained on it, then continues held-out text plainly and self-speculatively, side by side. Tables follow, and an HTML
    report with curves and the coloured text. The last line of stdout is one JSON document with every figure.

    A folder that no demo wrote is never touched. Exit status 1 if the two texts differ.
    """
    began = time.perf_counter()
    from headway.cli.reference_race import opening_race
    from headway.experiments.demo.options import DemoOptions
    from headway.experiments.demo.run import run_demo
    from headway.training.interruption import TrainingInterruptedError
    from headway.training.progress import TrainingProgress

    quiet_libraries()
    options = DemoOptions(output=output, overwrite=overwrite, steps=steps, quick=quick, seed=seed, threads=threads)
    console = human_console()
    race = None if quick else opening_race(console, threads=threads)
    try:
        demo = run_demo(options, console=console, on_event=TrainingProgress(console), began=began)
    except TrainingInterruptedError as error:
        note("interrupted; the next demo starts afresh")
        raise click.Abort from error
    note(f"\nreport: {demo.report}")
    emit_json(demo.result.to_json() | {"report": str(demo.report), "reference_race": race})
    if not demo.result.identical or (race is not None and not race["identical"]):
        raise click.exceptions.Exit(1)
