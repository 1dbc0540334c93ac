"""`headway report`: training runs side by side on one page."""

from __future__ import annotations

from pathlib import Path

import click

from headway.cli.console import emit_json, human_console, note


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="HTML file to write; it needs nothing but itself.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file named by --output.")
def report_command(runs: tuple[Path, ...], output: Path, overwrite: bool) -> None:
    """Compare training runs on one page, from their metrics alone.

    RUN is the output folder of `headway train`, finished or not. The first one is what the others are compared with.
    Curves of loss, accuracy and acceptance run over training tokens and over training FLOPs; a table says what each run
    needed for the same loss. The last line of stdout is one JSON document with every figure.

    Example: headway report out/n1 out/n4 --output n1-n4.html
    """
    from rich import box
    from rich.table import Table as RichTable

    from headway.experiments.report.report import compare_runs, write_page
    from headway.experiments.report.tables import Table, efficiency_table, final_table, warnings
    from headway.provenance import provenance

    report = compare_runs(runs)
    write_page(report, output, overwrite=overwrite)
    console = human_console()

    def show(table: Table) -> None:
        drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(row[0], *(cell.replace("\n", "  ") for cell in row[1:]))
        console.print(drawn)

    show(final_table(report.runs))
    if report.efficiency is not None:
        show(efficiency_table(report.efficiency))
    for text in warnings(report.runs):
        note(f"note: {text}")
    note(f"page: {output}")
    emit_json(report.to_json() | {"report": str(output), "provenance": provenance()})
