"""The demo's report: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from headway.evaluation.speed import HUGGING_FACE, PLAIN, SELF_SPECULATIVE, DecodingSpeed
from headway.experiments.demo.blocks import plain_text, printable, text_blocks
from headway.experiments.demo.figures import acceptance_figure, loss_figure, speed_figure
from headway.experiments.demo.folder import write_text
from headway.experiments.demo.generation import Comparison, RecordedGeneration
from headway.experiments.demo.page_style import STYLE_SHEET
from headway.experiments.demo.result import DemoResult
from headway.experiments.demo.tables import (
    FigureTable,
    acceptance_table,
    likelihood_table,
    number,
    percent,
    speed_note,
    speed_table,
    time_table,
)


def write_report(result: DemoResult, path: Path) -> None:
    """Write the report whole or not at all."""
    write_text(path, report_page(result))


def report_page(result: DemoResult) -> str:
    """The whole page: no script, no font, no picture from anywhere else."""
    parts = [
        _header(result),
        _cards(result),
        _generated_text(result),
        _prediction(result),
        _acceptance(result),
        _speed(result),
        _corpus(result),
        _conditions(result),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>headway demo</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(result: DemoResult) -> str:
    training = result.training
    return (
        "<header><h1>headway demo</h1><p>"
        f"A byte model of {training.parameters / 1e6:.2f} million parameters learned to predict "
        f"{training.num_future_tokens} bytes at once from {_text(result.corpus.source)} "
        f"({training.steps:,} steps, {_duration(training.seconds)}). Then it wrote text plainly, one byte per "
        "forward pass, and self-speculatively, several per forward pass."
        f"</p><p>{_text(str(result.provenance.get('date', '')))}</p></header>"
    )


def _cards(result: DemoResult) -> str:
    over_plain = result.speed.ratio(SELF_SPECULATIVE, PLAIN)
    over_hugging_face = result.speed.ratio(PLAIN, HUGGING_FACE)
    identical = sum(comparison.identical for comparison in result.comparisons)
    cards = (
        (
            "identical text",
            "yes" if result.identical else "no",
            f"{identical} of {len(result.comparisons)} prompts, token for token",
            "good" if result.identical else "bad",
        ),
        (
            "tokens per forward, loop-free",
            number(result.walk.mean_acceptance_length, 2),
            f"of {result.training.num_future_tokens}; drafts checked along held-out text",
            "",
        ),
        (
            "speed-up over plain decoding",
            f"{over_plain.median:.2f}x",
            f"rounds {over_plain.low:.2f}x to {over_plain.high:.2f}x; same engine and weights",
            "",
        ),
        (
            "plain engine over Hugging Face",
            f"{over_hugging_face.median:.2f}x",
            f"rounds {over_hugging_face.low:.2f}x to {over_hugging_face.high:.2f}x",
            "",
        ),
    )
    drawn = "".join(
        f'<div class="card"><div class="label">{label}</div><div class="figure {tone}">{figure}</div>'
        f'<div class="detail">{detail}</div></div>'
        for label, figure, detail, tone in cards
    )
    return f'<section class="cards">{drawn}</section>'


def _generated_text(result: DemoResult) -> str:
    keys = "".join(
        f'<span class="key f{index}">{word}</span>' for index, word in enumerate(("re", "turn ", "s", "elf"))
    )
    legend = (
        f'<p class="legend"><span>one colour = one forward pass: {keys}</span>'
        '<span><span class="prompt">grey</span> = prompt, from held-out text</span>'
        "<span>point at a piece to see its forward pass</span></p>"
    )
    pairs = "".join(_pair(number_, comparison) for number_, comparison in enumerate(result.comparisons, start=1))
    return f"<h2>The same text, in fewer forward passes</h2>{legend}{pairs}"


def _pair(position: int, comparison: Comparison) -> str:
    verdict = ("yes", "good") if comparison.identical else ("no", "bad")
    return (
        f'<div class="panel"><h3>Prompt {position}: <code>{_text(comparison.prompt.source)}</code>'
        f'<span class="verdict">identical: <span class="{verdict[1]}">{verdict[0]}</span></span></h3>'
        f'<div class="pair">{_way("plain", comparison, comparison.plain)}'
        f"{_way('self-speculative', comparison, comparison.self_speculative)}</div></div>"
    )


def _way(name: str, comparison: Comparison, generation: RecordedGeneration) -> str:
    pieces = "".join(
        f'<span class="f{block.forward % 4}" title="{_pass_name(block.forward)}: {block.num_tokens} '
        f'token{"s" if block.num_tokens > 1 else ""}">{_text(block.text)}</span>'
        for block in text_blocks(generation.tokens, generation.lengths)
    )
    return (
        f'<div><p class="way"><b>{name}</b>: {len(generation.tokens)} tokens, {generation.forwards} forward passes '
        f"({number(generation.tokens_per_forward, 2)} each), {generation.tokens_per_second:.0f} tokens/s</p>"
        f'<pre><span class="prompt">{_text(plain_text(comparison.prompt.tokens))}</span>{pieces}</pre></div>'
    )


def _pass_name(forward: int) -> str:
    return "prefill" if forward == 0 else f"forward pass {forward}"


def _prediction(result: DemoResult) -> str:
    return (
        "<h2>How well each offset predicts</h2>"
        '<p class="note">Offset 1 is the next byte, offset 2 the one after it, and so on: the further, the harder. '
        "Whole packages were held out; none of their text was trained on.</p>"
        '<div class="split">'
        f'<div class="panel">{_figure(loss_figure(result.training.curve, result.likelihood.nats))}</div>'
        f'<div class="panel">{_table(likelihood_table(result.likelihood))}</div></div>'
    )


def _acceptance(result: DemoResult) -> str:
    generated = result.generated
    return (
        "<h2>How many drafts are accepted</h2>"
        '<p class="note">Loop-free: the drafts are checked along held-out text that the model did not write. Generated '
        "text is shown apart, since a text that repeats itself is easy to draft for: of the 8-grams written, "
        f"{percent(generated.distinct_8grams)} are distinct. Percentages are shares of the drafts whose earlier "
        "offsets were all accepted.</p>"
        '<div class="split stacked">'
        f'<div class="panel">{_table(acceptance_table(result.walk, generated))}</div></div>'
        '<div class="split">'
        f'<div class="panel">{_figure(acceptance_figure(result.walk, generated))}</div>'
        f'<div class="panel">{_table(_length_table(result))}</div></div>'
    )


def _length_table(result: DemoResult) -> FigureTable:
    walk, blocks = result.walk, result.generated.blocks
    return FigureTable(
        title="Tokens emitted by one forward pass",
        columns=("tokens", "held-out text", "generated text"),
        rows=tuple(
            (
                str(length),
                percent(held_out / walk.blocks) if walk.blocks else "-",
                percent(written / blocks.blocks) if blocks.blocks else "-",
            )
            for length, (held_out, written) in enumerate(
                zip(walk.length_counts, blocks.length_counts, strict=True), start=1
            )
        ),
    )


def _speed(result: DemoResult) -> str:
    return (
        "<h2>How fast it is</h2>"
        f'<p class="note">The arms took turns prompt by prompt, {result.speed.repeats} rounds after a warm-up; '
        f"{result.speed.prompts} prompts, at most {result.speed.max_new_tokens} new tokens each, batch 1, greedy, on "
        f"{_text(result.speed.device)}. A time is that of a whole call, prefill included, for every arm alike. All "
        f"arms gave the same tokens: {'yes' if result.speed.identical else 'no'}. "
        f"{_text(speed_note(result.speed, result.walk))}</p>"
        f'<div class="panel">{_table(speed_table(result.speed))}</div>'
        '<div class="split">'
        f'<div class="panel">{_figure(speed_figure(result.speed))}</div>'
        f'<div class="panel">{_table(_ratio_table(result.speed))}</div></div>'
    )


def _ratio_table(speed: DecodingSpeed) -> FigureTable:
    return FigureTable(
        title="Speed-ups, each taken within a round",
        columns=("speed-up of", "median", "lowest", "highest"),
        rows=tuple(
            (f"{ratio.fast} over {ratio.slow}", f"{ratio.median:.2f}x", f"{ratio.low:.2f}x", f"{ratio.high:.2f}x")
            for ratio in speed.ratios
        ),
    )


def _corpus(result: DemoResult) -> str:
    corpus = result.corpus
    packages = "".join(f"<li><code>{_text(name)}</code></li>" for name in corpus.held_out_packages)
    dropped = "".join(
        f"<li><code>{_text(name)}</code> ({percent(overlap)} shared)</li>" for name, overlap in corpus.dropped
    )
    facts = (
        ("source", corpus.source),
        ("trained on", f"{corpus.train_documents:,} files, {corpus.train_bytes:,} bytes"),
        ("held out", f"{corpus.held_out_documents:,} files, {corpus.held_out_bytes:,} bytes, whole packages only"),
        ("dropped", f"{len(corpus.dropped):,} training files that repeat held-out text"),
    )
    return (
        f'<h2>The text</h2><div class="panel">{_facts(facts)}'
        f"<details open><summary>{len(corpus.held_out_packages)} held-out packages and modules</summary>"
        f'<ul class="names">{packages}</ul></details>'
        + (
            f"<details><summary>{len(corpus.dropped)} near-duplicates dropped from training</summary>"
            f'<ul class="names">{dropped}</ul></details>'
            if corpus.dropped
            else ""
        )
        + "</div>"
    )


def _conditions(result: DemoResult) -> str:
    training, machine = result.training, result.provenance.get("machine", {})
    versions = result.provenance.get("versions", {})
    facts = (
        ("recipe", training.recipe),
        (
            "parameters",
            f"{training.parameters:,}, of which {training.head_parameters:,} in the heads of offsets 2 to "
            f"{training.num_future_tokens}",
        ),
        (
            "trained",
            f"{training.steps:,} steps, {training.tokens:,} tokens, {training.tokens_per_second:,.0f} tokens/s",
        ),
        *((name, str(value)) for name, value in result.options.items()),
        ("machine", ", ".join(f"{name} {value}" for name, value in machine.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
        ("commit", _commit(result)),
        ("command", " ".join(map(str, result.provenance.get("argv", ())))),
    )
    return (
        '<h2>Where this comes from</h2><div class="split">'
        f'<div class="panel">{_facts(facts)}</div>'
        f'<div class="panel">{_table(time_table(result.seconds))}</div></div>'
    )


def _commit(result: DemoResult) -> str:
    commit = result.provenance.get("commit")
    if commit is None:
        return "not a checkout"
    return f"{commit[:12]}{' with changes' if result.provenance.get('modified') else ''}"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _table(table: FigureTable) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = "".join(_row(cells) for cells in table.rows)
    return f"<table><caption>{_text(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _figure(drawing: str) -> str:
    return f"<figure>{drawing}</figure>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _text(text: str) -> str:
    """Text as it must stand in a page: nothing in it is markup, and no control character is left."""
    return escape(printable(text))
