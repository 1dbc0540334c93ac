"""`headway train`: a configuration from flags, file and recipe, then the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import emit_json, human_console, note
from headway.cli.launched import EXIT_USAGE, launched_rank
from headway.cli.options import SectionedCommand, config_options, given_fields
from headway.cli.plan import list_recipes as show_recipes
from headway.cli.plan import refuse_plan_options, show_plan
from headway.provenance import provenance
from headway.training.config import TrainConfig
from headway.training.config_file import resolve_config

if TYPE_CHECKING:
    from headway.training.corpus import TrainingData
    from headway.training.run import Evaluator

_EXIT_AFTER_SIGNAL = 128


@click.command(
    "train",
    cls=SectionedCommand,
    epilog="Precedence: flags, then --config, then --recipe, then the defaults. 'none' unsets an option. "
    "The last line of stdout is one JSON document.",
)
@click.option("--recipe", metavar="NAME", help="Start from a recipe, such as tiny-bytes or gloeckle-7b-200b.")
@click.option("--list-recipes", is_flag=True, help="Show all recipes, those of the paper's tables among them.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; its keys are the options below."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show configuration, parameters, memory per device, steps, tokens and step time; train nothing.",
)
@click.option("--processes", type=click.IntRange(min=1), help="With --dry-run: plan for so many, one device each.")
@click.option(
    "--on",
    "device_name",
    metavar="DEVICE",
    help="With --dry-run: plan for this product, such as H100; else this machine.",
)
@config_options(TrainConfig)
@click.pass_context
def train_command(
    context: click.Context,
    /,
    recipe: str | None,
    list_recipes: bool,
    config_file: Path | None,
    dry_run: bool,
    processes: int | None,
    device_name: str | None,
    **fields: Any,
) -> None:
    """Train a multi-token model from text, or continue the unfinished run in the output folder.

    Example: headway train --recipe tiny-bytes --data my_project --output out/mine
    """
    if list_recipes:
        show_recipes()
        return
    refuse_plan_options(dry_run, {"--processes": processes, "--on": device_name})
    config = resolve_config(recipe=recipe, config_file=config_file, overrides=given_fields(context, TrainConfig))
    if not dry_run:
        _train(context, config)
    elif launched_rank() == 0:
        show_plan(config, processes=processes or 1, device_name=device_name or "this")


def _train(context: click.Context, config: TrainConfig) -> None:
    from transformers.utils import logging as transformers_logging

    from headway.processes import PeerError
    from headway.training.interruption import TrainingInterruptedError
    from headway.training.loop import train
    from headway.training.progress import TrainingProgress

    # Bars of its own for every file it writes would tear ours.
    transformers_logging.disable_progress_bar()
    try:
        result = train(
            config,
            evaluators=lambda data: _evaluators(config, data),
            on_event=TrainingProgress(human_console()),
        )
    except TrainingInterruptedError as interruption:
        if launched_rank() == 0:
            note(str(interruption))
        context.exit(_EXIT_AFTER_SIGNAL + interruption.signal_number)
    except PeerError:
        # The process that met the error has told it.
        context.exit(EXIT_USAGE)
    if launched_rank() != 0:
        return
    note(f"model: {result.model_directory}; try: headway generate {result.model_directory} PROMPT --compare")
    emit_json(result.to_json() | {"provenance": provenance()})


def _evaluators(config: TrainConfig, data: TrainingData) -> list[Evaluator]:
    if data.held_out is None:
        return []
    from headway.evaluation.periodic import held_out_evaluators

    return held_out_evaluators(
        data.held_out,
        sequence_length=config.sequence_length,
        rows=config.eval_rows,
        prompts=config.eval_prompts,
        prompt_tokens=config.eval_prompt_tokens,
        new_tokens=config.eval_new_tokens,
    )
