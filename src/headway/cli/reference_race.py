"""The race of the reference model: what `headway race` does without a model, and how the demo opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.cli.console import note

if TYPE_CHECKING:
    from rich.console import Console

PROMPT_BYTES = 96
NEW_TOKENS = 256
EXECUTOR = "lean"


def reference_start() -> tuple[Path, bytes]:
    """The reference model's folder, and the beginning of a function from a package that it has never seen.

    Raises:
        CheckpointError: no reference model here; one line says where to get it.
        DataError: this interpreter has no library source.
    """
    from headway.experiments.reference.place import reference_model, reference_prompts

    folder = reference_model()
    (prompt,) = reference_prompts(folder, count=1, prompt_bytes=PROMPT_BYTES)
    note(f"the reference model continues {prompt.source}, which it has never seen")
    return folder, bytes(prompt.tokens)


def opening_race(console: Console, *, threads: int | None) -> dict[str, Any] | None:
    """Race the reference model for the demo's first minute.

    Args:
        console: where it is drawn.
        threads: CPU threads; None for torch's choice.

    Returns:
        The race's figures; None where the reference model is not here, which a line tells.
    """
    from headway.cli.generate import GREEDY, open_session
    from headway.cli.live_race import run_race
    from headway.errors import CheckpointError, DataError
    from headway.training.threads import thread_count

    try:
        folder, prompt = reference_start()
    except (CheckpointError, DataError) as error:
        note(f"{error}\n")
        return None
    with thread_count(threads):
        session = open_session(
            str(folder),
            prompt,
            GREEDY,
            dtype=None,
            threads=None,
            stop=(),
            limit=NEW_TOKENS,
            show_blocks=False,
            drafting={"executor": EXECUTOR},
        )
        race = run_race(session, console, num_draft_tokens=None)
    console.print()
    return {"model": session.loaded.name, "prompt_bytes": len(prompt)} | race.to_json()
