"""`headway train`: a configuration from flags, file and recipe, then the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import counted, emit_json, human_console, note, show_facts, sized
from headway.cli.launched import EXIT_USAGE, launched_rank
from headway.cli.options import SectionedCommand, config_options, given_fields
from headway.provenance import provenance
from headway.training.config import TrainConfig
from headway.training.config_file import recipe_names, resolve_config, to_yaml

if TYPE_CHECKING:
    from headway.training.corpus import TrainingData
    from headway.training.estimate import TrainingPlan
    from headway.training.run import Evaluator

_EXIT_AFTER_SIGNAL = 128


@click.command(
    "train",
    cls=SectionedCommand,
    epilog="Precedence: flags, then --config, then --recipe, then the defaults. 'none' unsets an option. "
    "The last line of stdout is one JSON document.",
)
@click.option("--recipe", metavar="NAME", help=f"Start from a recipe: {', '.join(recipe_names())}.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; its keys are the options below."
)
@click.option(
    "--dry-run", is_flag=True, help="Show configuration, parameters, memory, steps and tokens; train nothing."
)
@config_options(TrainConfig)
@click.pass_context
def train_command(
    context: click.Context, /, recipe: str | None, config_file: Path | None, dry_run: bool, **fields: Any
) -> None:
    """Train a multi-token model from text, or continue the unfinished run in the output folder.

    Example: headway train --recipe tiny-bytes --data my_project --output out/mine
    """
    config = resolve_config(recipe=recipe, config_file=config_file, overrides=given_fields(context, TrainConfig))
    if not dry_run:
        _train(context, config)
    elif launched_rank() == 0:
        _show_plan(config)


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


def _show_plan(config: TrainConfig) -> None:
    from headway.training.estimate import plan_training

    plan = plan_training(config)
    memory = plan.memory
    click.echo(to_yaml(config), err=True)
    show_facts(
        "Parameters",
        [
            ("total", counted(plan.total_parameters)),
            ("without embeddings", counted(plan.non_embedding_parameters)),
            (f"heads of offsets 2..{config.num_future_tokens}", counted(plan.head_parameters)),
        ],
    )
    show_facts(
        "Memory of a step (estimate)",
        [
            ("weights", sized(memory.weights)),
            ("gradients", sized(memory.gradients)),
            ("optimizer", sized(memory.optimizer)),
            ("activations of a micro-batch", sized(memory.activations)),
            ("loss: one chunk of logits, gradients of heads", sized(memory.loss)),
            ("total", sized(memory.total)),
        ],
    )
    show_facts(
        "Run",
        [
            ("steps", _steps(config, plan)),
            ("tokens per step", f"{plan.tokens_per_step}"),
            *([] if plan.tokens is None else [("tokens", counted(plan.tokens))]),
        ],
    )
    emit_json({"config": config.to_dict(), "plan": plan.to_json(), "provenance": provenance()})


def _steps(config: TrainConfig, plan: TrainingPlan) -> str:
    if config.epochs is not None:
        return f"{config.epochs:g} epochs; the text is not read for a plan"
    return f"{plan.steps}, {plan.warmup_steps} of them warm-up"
