"""`headway analyze`: what a model says about the next two tokens along a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import DTYPES, emit_json, human_console, note, show_facts
from headway.cli.prompt import encode_prompt, read_prompt
from headway.errors import ConfigError
from headway.provenance import provenance

if TYPE_CHECKING:
    from headway.evaluation.information import TextInformation

DEFAULT_TOKENS = 512
MOST_LISTED = 8
_MEASURES = ("information", "uncertainty", "surprise", "sigma", "head")


@click.command("analyze")
@click.argument("model")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="Read the text from this file. Without it and without TEXT: from stdin.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=3),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Analyse so many tokens of the text at most, from its beginning.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(min=8),
    help="Read the text in windows of so many tokens that overlap by half. Default: 256, or the model's longest context.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1, max=1024),
    help="Next tokens tried at each position. Default: all of a vocabulary of up to 1024, else the 64 likeliest.",
)
@click.option("--by", type=click.Choice(_MEASURES), default="information", show_default=True, help="What to shade by.")
@click.option(
    "--choice-share",
    type=click.FloatRange(min=0, max=1),
    default=0.1,
    show_default=True,
    help="Share of the positions marked as choice points: those with the largest I(X;Y).",
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with everything to this file."
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --html.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. Default: as saved.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
def analyze_command(
    model: str,
    text: str | None,
    file: Path | None,
    max_tokens: int,
    context_tokens: int | None,
    candidates: int | None,
    by: str,
    choice_share: float,
    html: Path | None,
    overwrite: bool,
    dtype: str | None,
    threads: int | None,
) -> None:
    """Show what a model says about the next two tokens along a text.

    MODEL is a headway folder, or a plain Hugging Face one. At every position, X is the next token and Y the one after it;
    the model's own next-token distributions, after the text and after every candidate for X, give the terms of
    H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X), once as the model expects them and once with the text as the truth, where
    the left side is the loss of 2-token prediction.

    The text is shown in shades of how much each token decides what follows, I(X;Y); where it is largest are the choice
    points. With heads, head 2 is compared with what it should say. The last line of stdout is one JSON document.
    """
    if html is not None and html.exists() and not overwrite:
        raise ConfigError(f"{html} exists; pass --overwrite to replace it or give another --html")
    data = read_prompt(text, file)

    import torch

    from headway.cli.models import load_model_folder
    from headway.evaluation.information import analyze_text
    from headway.experiments.analysis.page import analysis_page
    from headway.experiments.demo.folder import write_text

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model_folder(model, dtype=dtype)
    if by == "head" and loaded.model.num_future_tokens == 1:
        raise ConfigError(f"{loaded.name} has no heads to shade by; leave --by out or choose another measure")
    ids_T = encode_prompt(data, loaded.tokenizer)[0].to(loaded.model.device)
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or 256
    if context_tokens is not None and context_tokens > longest:
        raise ConfigError(
            f"--context-tokens must be at most the model's longest context, {longest}: got {context_tokens}"
        )
    result = analyze_text(
        loaded.model,
        ids_T[:max_tokens],
        candidates=candidates,
        context_tokens=context_tokens or min(256, longest),
    )
    if len(ids_T) > max_tokens:
        note(f"analysed: the first {max_tokens} of {len(ids_T)} tokens (--max-tokens)")
    pieces = _pieces(result, loaded.tokenizer)
    _show(result, pieces, name=loaded.name, by=by, share=choice_share)
    origin = provenance()
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, analysis_page(result, pieces, model=loaded.name, share=choice_share, provenance=origin))
        note(f"page: {html}")
    emit_json(
        {
            "model": loaded.name,
            "choice_share": choice_share,
            "choice_points": list(result.choice_points(choice_share)),
            **result.to_json(),
            "provenance": origin,
        }
    )


def _pieces(result: TextInformation, tokenizer: Any) -> list[str]:
    """Printable text of every token; a character of several tokens belongs to the last of them."""
    from headway.cli.live_text import TextDecoder
    from headway.experiments.demo.blocks import printable

    decoder = TextDecoder(tokenizer, [])
    last = len(result.tokens) - 1
    return [printable(decoder.feed([token], final=index == last)) for index, token in enumerate(result.tokens)]


def _show(result: TextInformation, pieces: list[str], *, name: str, by: str, share: float) -> None:
    from headway.experiments.analysis.page import TERM_NAMES
    from headway.experiments.analysis.shading import measures, shaded_text

    console = human_console()
    colours = console.is_terminal and not (console.no_color or console.is_dumb_terminal)
    measure = next(measure for measure in measures(result) if measure.name == by)
    points = result.choice_points(share)
    marked = "underlined" if colours else "in [brackets]"
    note(f"shaded by {measure.title}; choice points {marked}" if colours else f"choice points {marked}")
    console.print(shaded_text(pieces, measure, points, colours=colours), soft_wrap=True)
    console.print()
    belief, observed = result.belief.means(), result.observed.means()
    rows = [("", f"{'belief':>8}  {'text':>8}")]
    rows += [(symbol, f"{belief[term]:8.4f}  {observed[term]:8.4f}") for term, symbol in TERM_NAMES.items()]
    show_facts(f"{name}: nats per position, means over {result.positions} positions", rows)
    left_out = result.means()["left_out"]
    facts = [
        (
            "next tokens tried",
            f"all {result.vocabulary_size}: exact"
            if result.exact
            else f"{result.candidates} of {result.vocabulary_size}; {100 * left_out:.2f} % of the probability left out",
        ),
        (
            "loss of two tokens",
            f"{observed['entropy_x'] + observed['entropy_y']:.4f} nats with the exact second marginal",
        ),
    ]
    if result.second_head is not None:
        head = result.second_head.means()
        target = "p(y|x), which it is told" if result.second_head.reads_next_token else "the marginal p(y)"
        facts += [
            ("head 2", f"{head['nats']:.4f} nats; {target}: {head['target_nats']:.4f}"),
            ("", f"divergence {head['divergence']:.4f}, same likeliest token {100 * head['agrees']:.1f} %"),
        ]
    show_facts("How it was found", facts)
    strongest = sorted(points, key=lambda point: -result.belief.mutual_information[point])[:MOST_LISTED]
    if strongest:
        show_facts(
            "Strongest choice points: what came after what, I(X;Y), sigma",
            [(_line_before(pieces, point), _figures(result, pieces, point)) for point in strongest],
        )


def _line_before(pieces: list[str], point: int, *, width: int = 28) -> str:
    return "".join(pieces[: point + 1])[-width:].replace("\n", "\u23ce").rjust(width)


def _figures(result: TextInformation, pieces: list[str], point: int) -> str:
    token = repr(pieces[point + 1])
    return f"{token:<8} {result.belief.mutual_information[point]:.3f}  {result.value_deviation[point]:.3f}"
