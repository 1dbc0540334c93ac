"""The page of a benchmark: one HTML file without scripts that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from headway.experiments.bench.charts import batch_chart, batch_curves, waterfall
from headway.experiments.bench.table import (
    WordTable,
    acceptance_table,
    break_even_line,
    floor_table,
    headline_lines,
    skipped_lines,
    speed_table,
    step_table,
    walk_table,
)
from headway.experiments.report.chart import key
from headway.experiments.report.style import STYLE_SHEET

_STYLE = """
thead th:first-child { text-align: left; padding-left: 0; }
tr.best > * { font-weight: 650; color: var(--ink); }
figure.wide { padding: 16px 18px; } figure.wide svg { max-width: 760px; }
"""
BEST = ' class="best"'
_READING = (
    "All arms took turns, prompt by prompt, in one process. Figures are medians over rounds with 95 % intervals (bootstrap "
    "over rounds); ratios are of the same round. Speeds are those after the prefill, which has its own column. Tokens are "
    "token ids; none behind an end of text counts. Where a text loops (fewer than half of its 8-grams distinct), its call "
    "is left out of the headline: loops are easy to draft for."
)
_ACCEPTANCE_NOTE = (
    "Tokens per forward, the model's own token included: on the timed texts that do not loop, on all of them, on texts drawn at "
    "temperature 1, and along the prompts' own text (drafts of one shape). An arm breaks even with the fastest plain engine at "
    "the tokens per forward that make up for its dearer forwards; acceptance on real text over that is what to expect there."
)
_STEP_NOTE = (
    "Verify: base and heads on the block, and the base's logits. Draft: the heads' logits and the next block. Rest: "
    "acceptance, the cache's bookkeeping and the loop. The parts are from one generation apart from the rounds. The floor "
    "is the bytes of weights and cache over the speed at which this process read the weights between the rounds; small "
    "models lie in caches, which have no such limit."
)


def bench_page(document: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        document: of `run_bench`.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>headway bench: {escape(document['model'])}</title>\n<style>{STYLE_SHEET}{_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(_parts(document)) + "\n</main>\n</body>\n</html>\n"
    )


def _parts(document: Mapping[str, Any]) -> Iterator[str]:
    setting = document["setting"]
    shortest, longest = setting["prompt_tokens"]
    length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    yield (
        f"<header><h1>Decoding {escape(document['model'])}</h1><p>{document['parameters'] / 1e6:.1f} million parameters, "
        f"n = {document['num_future_tokens']}, {escape(setting['dtype'])} on {escape(setting['device'])}, "
        f"{setting['threads']} threads. {setting['num_prompts']} prompts of {length} tokens "
        f"({escape(setting['prompts'])}), {setting['max_new_tokens']} new ones each, "
        f"{_how(setting['temperature'])}, {setting['rounds']} rounds.</p>"
        f"</header><p class='note'>{escape(_READING)}</p>"
    )
    if not document["equal"]:
        yield '<ul class="warnings"><li>A greedy text differs from plain decoding by more than a near-tie.</li></ul>'
    lines = [line for batch in document["batches"] for line in headline_lines(batch)]
    yield f"<h2>Headline</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    if drawing := waterfall(document):
        yield (
            f"<figure class='wide'><figcaption>Engine, then drafts (batch {document['batches'][0]['batch']}; the bar is the "
            f"gain, the line its 95 % interval)</figcaption>{drawing}</figure>"
        )
    if drawing := batch_chart(document):
        legend = "".join(key(name, number) for number, (name, _) in enumerate(batch_curves(document)))
        yield (
            f"<h2>Against the batch</h2><div class='bar'>{legend}</div><figure class='wide'><figcaption>Speed-up over "
            f"the fastest plain engine of each batch</figcaption>{drawing}</figure>"
        )
    yield "<h2>Speed</h2>"
    for batch in document["batches"]:
        yield _table(speed_table(batch))
    yield f"<h2>Acceptance</h2><p class='note'>{escape(_ACCEPTANCE_NOTE)}</p>"
    for batch in document["batches"]:
        if (acceptance := acceptance_table(batch)) is not None:
            yield _table(acceptance)
    if (walk := walk_table(document)) is not None:
        yield _table(walk)
    yield f"<h2>Where a forward's time goes</h2><p class='note'>{escape(_STEP_NOTE)}</p>"
    for batch in document["batches"]:
        yield _table(step_table(batch))
    if (floors := floor_table(document)) is not None:
        yield _table(floors)
    if (line := break_even_line(document)) is not None:
        yield f"<p>{escape(line[:1].upper() + line[1:])}.</p>"
    if skipped := skipped_lines(document):
        yield f"<h2>Not measured</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in skipped)}</ul>"
    origin = document["provenance"]
    yield (
        f"<footer><p>{escape(str(origin['date']))}, headway {escape(str(origin['versions']['headway']))}, torch "
        f"{escape(str(origin['versions']['torch']))}, transformers {escape(str(origin['versions']['transformers']))}, "
        f"{escape(str(origin['machine']['cpu']))}. <code>{escape(' '.join(origin['argv']))}</code></p></footer>"
    )


def _how(temperature: float | None) -> str:
    return "greedy" if temperature is None else f"drawn at temperature {temperature:g}"


def _table(words: WordTable) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in words.columns)
    body = "".join(
        f"<tr{BEST if number == words.best else ''}>"
        f'<th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for number, row in enumerate(words.rows)
    )
    return (
        f'<div class="panel"><table><caption>{escape(words.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
