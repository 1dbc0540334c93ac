"""`headway calibrate`: fit a model's candidate tree to a text and to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from headway.cli.console import DTYPES, emit_json, human_console, note
from headway.cli.prompt import encode_prompt, read_prompt
from headway.errors import ConfigError, DecodingError

if TYPE_CHECKING:
    from headway.decoding.calibration.run import CalibrationOptions, CalibrationResult
    from headway.decoding.calibration.solve import Expectation
    from headway.functional.tree import Tree

MOST_RANKS_SHOWN = 6


@click.command("calibrate")
@click.argument("model")
@click.argument("text", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--executor",
    type=click.Choice(["eager", "lean"]),
    default="lean",
    show_default=True,
    help="What will run the model.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows that will be decoded together."
)
@click.option(
    "--against",
    type=click.Choice(["continuation", "text"]),
    default="continuation",
    show_default=True,
    help="Whose tokens drafts should hit: the model's own continuation of pieces of TEXT, or what it would choose at each "
    "place of TEXT itself (for models whose continuations all loop).",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="At which continuations are drawn, to fit drafts to decoding at that temperature; 0 for greedy ones.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of drawn continuations.")
@click.option("--keep-loops", is_flag=True, help="Count continuations that loop too; by default they are left out.")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="Pieces of TEXT.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Of a piece; costs are measured at this context. Default: 128."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), help="Of each continuation, or of TEXT after it. Default: 192."
)
@click.option(
    "--max-nodes", type=click.IntRange(min=1), default=32, show_default=True, help="Drafted tokens of the largest tree."
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Candidates of a head that trees may take.",
)
@click.option("--lookup", is_flag=True, help="Also find the tree to go beside copies (--drafts heads+lookup).")
@click.option(
    "--num-lookup-tokens", type=click.IntRange(min=1), default=8, show_default=True, help="That a lookup copies."
)
@click.option(
    "--draft-vocabularies",
    metavar="SIZE,...",
    help="Sizes to try for the part of the vocabulary that the heads score; none for all of it only. Default: halves of the "
    "vocabulary down to 1024 where it has 4096 tokens or more.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Of measuring costs.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write tokens/s against nodes as SVG.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --plot.")
@click.option("--dry-run", is_flag=True, help="Measure and show; store nothing.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. Default: as saved.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
def calibrate_command(
    model: str,
    text: Path,
    executor: str,
    batch: int,
    against: str,
    temperature: float,
    seed: int,
    keep_loops: bool,
    windows: int,
    prompt_tokens: int | None,
    new_tokens: int | None,
    max_nodes: int,
    ranks: int,
    lookup: bool,
    num_lookup_tokens: int,
    draft_vocabularies: str | None,
    rounds: int,
    plot: Path | None,
    overwrite: bool,
    dry_run: bool,
    dtype: str | None,
    threads: int | None,
) -> None:
    """Fit a model's drafts to a text and to this machine.

    MODEL is a headway folder, TEXT a file like what will be decoded. Measured are how often the model's own token is each
    head's first, second, ... candidate, and what a forward with 1, 2, ... drafted tokens costs here. The tree with the most
    expected tokens per second is stored in MODEL/mtp/calibration.json, for this processor, number of threads, dtype,
    executor and batch only, and used by `headway generate --tree calibrated`. Nothing else in MODEL changes.

    The last line of stdout is one JSON document.
    """
    import torch

    from headway.cli.models import load_model_folder
    from headway.decoding.calibration.run import CalibrationOptions, calibrate

    if plot is not None and plot.exists() and not overwrite:
        raise ConfigError(f"{plot} exists; pass --overwrite to replace it, or another name")
    sizes = _sizes(draft_vocabularies)
    if threads is not None:
        torch.set_num_threads(threads)
    data = read_prompt(None, text)
    loaded = load_model_folder(model, dtype=dtype)
    if not loaded.has_heads:
        raise DecodingError(f"{loaded.name} has no heads, so there is nothing to calibrate; pass a headway folder")
    longest = int(loaded.model.config.max_position_embeddings)
    prompt_tokens = prompt_tokens or min(128, longest // 4)
    options = CalibrationOptions(
        executor="lean" if executor == "lean" else "eager",
        batch=batch,
        against="text" if against == "text" else "continuation",
        temperature=temperature,
        seed=seed,
        keep_loops=keep_loops,
        windows=windows,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens or min(192, longest - prompt_tokens),
        most_nodes=max_nodes,
        num_ranks=min(ranks, int(loaded.model.config.vocab_size)),
        lookup=lookup,
        num_lookup_tokens=num_lookup_tokens,
        draft_vocabularies=sizes,
        rounds=rounds,
    )
    console = human_console()
    with console.status("measuring") as status:
        result = calibrate(
            loaded.model,
            encode_prompt(data, loaded.tokenizer)[0].tolist(),
            options,
            store=not dry_run,
            progress=lambda line: status.update(line),
        )
    _show(result, options)
    if plot is not None:
        from headway.experiments.bench.charts import standalone

        plot.write_text(standalone(calibration_chart(result)), encoding="utf-8")
        note(f"plot: {plot}")
    note("nothing was stored" if dry_run else f"stored in {model}/mtp/calibration.json; use it: --tree calibrated")
    emit_json({"model": loaded.name, **result.calibration.to_json(), "stored": not dry_run})


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "none":
        return ()
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError(f"--draft-vocabularies takes sizes separated by commas, or none: got {text!r}")
    return sizes


def _show(result: CalibrationResult, options: CalibrationOptions) -> None:
    from rich.table import Table

    console = human_console()
    console.print(result.calibration.key.in_words(), style="bold")
    if result.calibration.key.executor != options.executor:
        console.print(f"this model has no {options.executor} form, so it was measured as it runs: eagerly")
    if result.looping:
        counted = "counted as asked" if options.keep_loops else "left out"
        console.print(f"{result.looping} continuations loop, which is easy to draft for: {counted}")
    console.print("accuracy where all earlier offsets are right, by rank")
    table = Table()
    shown = min(MOST_RANKS_SHOWN, len(result.accuracy[0]))
    for name in ("offset", *(str(rank) for rank in range(shown)), "sum"):
        table.add_column(name, justify="right")
    for offset, ranks in enumerate(result.accuracy, start=2):
        table.add_row(str(offset), *(f"{share:.3f}" for share in ranks[:shown]), f"{sum(ranks):.3f}")
    console.print(table)
    console.print("cost of a forward")
    table = Table()
    for name in ("drafted tokens", "shape", "ms", "over plain"):
        table.add_column(name, justify="right")
    steps = result.calibration.report["steps"]
    for step in sorted(steps, key=lambda step: (not step["chain"], step["nodes"], step["depth"])):
        shape = f"chain of {step['nodes']}" if step["chain"] else f"tree, depth {step['depth']}"
        row = (str(step["nodes"]), shape if step["nodes"] else "plain", f"{step['ms']:.2f}")
        table.add_row(*row, f"{step['ms'] / steps[0]['ms']:.2f}")
    console.print(table)
    for line in result.calibration.report["draft_vocabulary"]:
        console.print(
            f"heads score {line['tokens']} tokens: {line['tokens_per_forward']:.2f} tokens per forward, {line['ms']:.2f} ms, "
            f"{line['tokens_per_second']:.0f} tokens/s"
        )
    console.print("expected")
    table = Table()
    for name in ("draft", "tokens per forward", "ms per forward", "tokens/s", "over plain"):
        table.add_column(name, justify="right")
    for name, one in _summary(result):
        table.add_row(
            name,
            f"{one.tokens_per_forward:.2f}",
            f"{one.forward_seconds * 1000:.2f}",
            f"{one.tokens_per_second:.0f}",
            f"x{one.tokens_per_second / result.plain.tokens_per_second:.2f}",
        )
    console.print(table)
    console.print("chosen: " + ("plain decoding" if not result.best.nodes else f"{result.best.nodes} drafted tokens"))
    for line in drawn_tree(result.best.tree):
        console.print(line)


def _summary(result: CalibrationResult) -> list[tuple[str, Expectation]]:
    from headway.decoding.calibration.solve import fastest

    rows = [("plain", result.plain)]
    for name, found in (("chain", result.chains), ("tree", result.trees), ("tree + lookup", result.beside_lookup)):
        if found:
            best = fastest(list(found))
            rows.append((f"{name}, {best.nodes} nodes", best))
    return rows


def drawn_tree(tree: Tree) -> list[str]:
    """A tree as lines of text: one node a line, by its rank, its children below it.

    >>> from headway.functional.tree import Tree
    >>> for line in drawn_tree(Tree.from_choices([(0,), (1,), (0, 0), (0, 1)])): print(line)
    *
    |- 0
    |  |- 0
    |  `- 1
    `- 1
    """
    lines = ["*"] if len(tree) > 1 else []

    def draw(node: int, before: str) -> None:
        children = tree.children[node]
        for child in children:
            last = child == children[-1]
            lines.append(f"{before}{'`-' if last else '|-'} {tree.ranks[child]}")
            draw(child, before + ("   " if last else "|  "))

    draw(0, "")
    return lines


def calibration_chart(result: CalibrationResult) -> str:
    """Expected tokens per second against drafted tokens, as SVG: chains, trees, and trees beside copies."""
    from headway.experiments.report.chart import Line, line_chart

    def points(found: tuple[Expectation, ...]) -> list[tuple[float, float]]:
        return [(float(one.nodes), one.tokens_per_second) for one in (result.plain, *found)]

    lines = [
        Line(name, number, points(found))
        for number, (name, found) in enumerate(
            (("chain", result.chains), ("tree", result.trees), ("tree + lookup", result.beside_lookup))
        )
        if found
    ]
    return line_chart(
        lines,
        identifier="calibration",
        title="Expected tokens per second",
        axis="drafted tokens per forward",
        place=lambda place: f"{place:g}",
        value=lambda value: f"{value:.0f}",
        tick_word=lambda tick: f"{tick:g}",
        lower_is_better=False,
    )
