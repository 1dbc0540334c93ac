"""What `headway train --dry-run` shows: what the run will take, of which device, for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import counted, emit_json, human_console, show_facts, sized
from headway.provenance import provenance
from headway.training.config import TrainConfig
from headway.training.config_file import recipe_summaries, to_yaml

if TYPE_CHECKING:
    from headway.training.devices import Device
    from headway.training.estimate import TrainingPlan
    from headway.training.step_time import StepTime

# What the framework needs beside what is counted: library workspaces, fragments, temporaries of the backward pass.
_SPARE = 0.10


def show_plan(config: TrainConfig, *, processes: int, device_name: str) -> None:
    """Print configuration, parameters, memory per device, steps, tokens and step time; then one JSON document."""
    from headway.training.devices import device_to_plan_for
    from headway.training.estimate import plan_training

    device = device_to_plan_for(device_name, precision=config.precision)
    plan = plan_training(config, processes=processes)
    time = plan.time_on(device)
    click.echo(to_yaml(config), err=True)
    show_facts(
        "Parameters",
        [
            ("total", counted(plan.total_parameters)),
            ("without embeddings", counted(plan.non_embedding_parameters)),
            (f"heads of offsets 2..{config.num_future_tokens}", counted(plan.head_parameters)),
        ],
    )
    _show_memory(plan)
    _show_layouts(config, plan, device)
    show_facts("Run", _run_facts(config, plan, device, time))
    emit_json(
        {
            "config": config.to_dict(),
            "plan": plan.to_json(),
            "device": vars(device),
            "time": None if time is None else vars(time) | {"seconds": time.seconds},
            "provenance": provenance(),
        }
    )


def list_recipes() -> None:
    """Print the names of all recipes, each with its first line; then one JSON document."""
    summaries = recipe_summaries()
    show_facts("Recipes (headway train --recipe NAME)", list(summaries.items()))
    emit_json({"recipes": summaries})


def _show_memory(plan: TrainingPlan) -> None:
    memory = plan.memory
    where = "a step" if plan.processes == 1 else f"a step on each of {plan.processes} devices, {plan.parallel}"
    show_facts(
        f"Memory of {where} (estimate)",
        [
            ("weights", sized(memory.weights)),
            ("gradients", sized(memory.gradients)),
            ("optimizer", sized(memory.optimizer)),
            ("activations of a micro-batch", sized(memory.activations)),
            ("loss: one chunk of logits, gradients of heads", sized(memory.loss)),
            *([("gathered: two layers, embedding, unembedding", sized(memory.gathered))] if memory.gathered else []),
            *([("teacher", sized(memory.teacher))] if memory.teacher else []),
            ("total", sized(memory.total)),
        ],
    )


def _show_layouts(config: TrainConfig, plan: TrainingPlan, device: Device) -> None:
    from rich.table import Table
    from rich.text import Text

    limit = device.memory_bytes
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("  parallel", "processes", "checkpointing", "memory of a device", *(() if limit is None else ("",))):
        table.add_column(column, no_wrap=True)
    for layout in plan.layouts:
        total = layout.memory.total
        cells = [
            f"  {layout.parallel}",
            str(layout.processes),
            "on" if layout.gradient_checkpointing else "off",
            sized(total),
        ]
        if limit is not None:
            cells.append("fits" if total * (1 + _SPARE) <= limit else "does not fit")
        table.add_row(*cells)
    console = human_console()
    known = "" if limit is None else f", beside {sized(limit)} of {device.name} with {_SPARE:.0%} to spare"
    console.print(Text(f"Ways to train it with micro-batches of {config.batch_size} rows{known}", style="bold"))
    console.print(table)


def _run_facts(config: TrainConfig, plan: TrainingPlan, device: Device, time: StepTime | None) -> list[tuple[str, str]]:
    facts = [("steps", _steps(config, plan)), ("tokens per step", _tokens_per_step(config, plan))]
    if plan.tokens is not None:
        facts.append(("tokens", counted(plan.tokens)))
    if time is None:
        facts.append(("time", "not estimated: this model's operations depend on its data"))
        return facts
    how = "measured" if device.measured else "data sheet"
    facts += [
        ("device", f"{device.name}: {device.flops_per_second / 1e12:.4g} TFLOP/s ({how}), {config.precision}"),
        ("time of a step", f"{_duration(time.seconds)} if it reaches {device.assumed_mfu:.0%} of that (assumed)"),
        ("tokens per second", f"{time.tokens_per_second:,.0f}"),
    ]
    if time.exchanged_bytes:
        facts.append(("sent by a device in a step", f"{sized(time.exchanged_bytes)}, assumed to be hidden"))
    if time.run_seconds is not None:
        facts.append(("all steps", _duration(time.run_seconds)))
    return facts


def _tokens_per_step(config: TrainConfig, plan: TrainingPlan) -> str:
    across = "" if plan.processes == 1 else f" x {plan.processes} processes"
    return (
        f"{plan.tokens_per_step}: {config.batch_size} rows x {plan.micro_batches} micro-batches{across} x "
        f"{config.sequence_length} tokens"
    )


def _steps(config: TrainConfig, plan: TrainingPlan) -> str:
    if config.epochs is not None:
        return f"{config.epochs:g} epochs; the text is not read for a plan"
    return f"{plan.steps}, {plan.warmup_steps} of them warm-up"


def _duration(seconds: float) -> str:
    """A time a person can read at a glance.

    >>> _duration(0.25), _duration(90), _duration(7200), _duration(200_000)
    ('0.25 s', '1.5 min', '2.0 h', '2.3 days')
    """
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s"


def refuse_plan_options(dry_run: bool, given: dict[str, Any]) -> None:
    """Refuse options that only a plan reads, where none is asked for.

    Raises:
        UsageError: one of them is given.
    """
    for name, value in given.items():
        if value is not None and not dry_run:
            raise click.UsageError(f"{name} is for a plan: pass --dry-run with it (processes are started by torchrun)")
