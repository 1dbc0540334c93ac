"""`headway race`: plain and self-speculative decoding of one prompt typing side by side."""

from __future__ import annotations

from pathlib import Path

import click

from headway.cli.console import DTYPES, emit_json
from headway.cli.drafting import EXECUTOR_FLAG, drafting_arguments
from headway.cli.generate import EXIT_DIFFERENT, GREEDY, open_session
from headway.cli.prompt import read_prompt
from headway.cli.reference_race import reference_start
from headway.errors import ConfigError, DecodingError


@click.command("race")
@click.argument("model", required=False)
@click.argument("prompt", required=False, metavar="FILE|PROMPT")
@click.option("--max-new-tokens", type=click.IntRange(min=2), help="Length of the race. Default: 256.")
@click.option(
    "--num-draft-tokens", type=click.IntRange(min=1), help="Drafted tokens per forward. Default: one per head."
)
@click.option(
    "--tree",
    metavar="NODES|JSON|calibrated",
    help="Race with a tree of candidates, as `headway generate` does. Default: a chain.",
)
@EXECUTOR_FLAG
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. Default: as saved.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
def race_command(
    model: str | None,
    prompt: str | None,
    max_new_tokens: int | None,
    num_draft_tokens: int | None,
    tree: str | None,
    executor: str | None,
    dtype: str | None,
    threads: int | None,
) -> None:
    """Watch plain and self-speculative decoding type the same text.

    MODEL is a headway folder. FILE|PROMPT is a file to continue where one of that name exists, else the text itself;
    without it the prompt is read from stdin. Without a MODEL the reference model of headway's repository continues a
    library function that it has never seen, on the lean executor.

    The two generations take turns on this machine, each on its own clock, the one that is behind next, so that both panes
    keep the pace at which they would run alone. Colours (bars where there are none) show which forward pass gave what.

    It ends with "identical: yes, x1.N": the speed-up is the median of further rounds of both in turns, in which nothing
    is drawn. The last line of stdout is one JSON document; the status is 1 where a token differs.
    """
    if model is None:
        folder, data = reference_start()
        model = str(folder)
    else:
        file = None if prompt is None or not _is_file(prompt) else Path(prompt)
        data = read_prompt(None if file is not None else prompt, file)
    session = open_session(
        model,
        data,
        GREEDY,
        dtype=dtype,
        threads=threads,
        stop=(),
        limit=max_new_tokens,
        show_blocks=False,
        drafting=drafting_arguments({"executor": executor, "tree": tree}),
    )
    if not session.loaded.has_heads:
        raise DecodingError(f"{session.loaded.name} has no heads, so there is no race; pass a headway folder")
    most = session.loaded.model.num_future_tokens - 1
    if num_draft_tokens is not None and num_draft_tokens > most:
        raise ConfigError(f"--num-draft-tokens must be at most {most}, one per head: got {num_draft_tokens}")

    from headway.cli.console import human_console
    from headway.cli.generate import describe
    from headway.cli.live_race import run_race

    race = run_race(session, human_console(), num_draft_tokens=num_draft_tokens)
    emit_json(describe(session) | race.to_json())
    if not race.identical:
        raise click.exceptions.Exit(EXIT_DIFFERENT)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long or with a NUL: a prompt, no path
        return False
