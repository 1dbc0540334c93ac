"""The demo from text to report: train, generate both ways, measure, show."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from headway.data.loader import held_out_windows
from headway.data.token_cache import TokenCache
from headway.evaluation.acceptance import walk_acceptance
from headway.evaluation.likelihood import evaluate_likelihood
from headway.evaluation.speed import measure_speed
from headway.experiments.demo.corpus import DemoCorpus, check_same_text, held_out_prompts, read_corpus
from headway.experiments.demo.folder import claim_folder, finish_folder, write_json
from headway.experiments.demo.generation import Comparison, DemoPrompt, compare_prompt, generated_acceptance
from headway.experiments.demo.options import RECIPE, DemoOptions
from headway.experiments.demo.report import write_report
from headway.experiments.demo.result import CurvePoint, DemoResult, TrainingSummary
from headway.experiments.demo.side_by_side import show_comparisons, verdict_line
from headway.experiments.demo.tables import (
    acceptance_table,
    likelihood_table,
    rich_table,
    speed_note,
    speed_table,
    time_table,
)
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance
from headway.training.config import TrainConfig
from headway.training.config_file import resolve_config
from headway.training.corpus import TrainingData
from headway.training.events import Event, Listener, RunEnded, RunStarted
from headway.training.loop import TrainResult, train
from headway.training.metric_files import read_metrics
from headway.training.run import Evaluator
from headway.training.run_directory import METRICS
from headway.training.threads import thread_count

REPORT, RESULT = "report.html", "result.json"

_ROWS_PER_FORWARD = 32


class PartTimer:
    """Wall seconds of each part of the demo, in the order in which the parts first ran."""

    def __init__(self, *, began: float) -> None:
        """Start counting the total at `began`, a moment of `time.perf_counter`."""
        self.began = began
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def with_total(self) -> dict[str, float]:
        """All parts, and the time since the demo began."""
        return {**self.seconds, "total": time.perf_counter() - self.began}


@dataclass(frozen=True)
class FinishedDemo:
    """Every figure, and where the report lies."""

    result: DemoResult
    report: Path


def run_demo(
    options: DemoOptions, *, console: Console, on_event: Listener | None = None, began: float | None = None
) -> FinishedDemo:
    """Train a byte model on the standard library, decode held-out prompts both ways, measure, write the report.

    torch's thread count is afterwards as it was before.

    Args:
        options: what the caller chose.
        console: where a person looks on.
        on_event: hears of the training run, for a progress bar.
        began: `time.perf_counter()` at which the demo began, for its total time; now where None.

    Raises:
        ConfigError: a folder that holds something else, or options that cannot work.
        HeadwayError: see `headway.training.loop.train`.
    """
    now = time.perf_counter()
    timer = PartTimer(began=now if began is None else began)
    if began is not None:
        timer.seconds["loading the program"] = now - began
    config = options.training_config()
    claim_folder(options.folder, replace_demo=options.may_replace_demo)
    console.print(
        f"headway demo: a byte model with {config.num_future_tokens} future tokens, {config.steps} steps, into "
        f"{options.folder}"
    )
    if config.precision != resolve_config(recipe=RECIPE).precision and not options.quick:
        console.print("this machine has no fast bfloat16: training in float32, which takes longer")
    with thread_count(options.threads):
        with timer.part("preparing the text"):
            corpus = read_corpus(config)
            prompts = held_out_prompts(
                corpus.held_out, count=options.scale.prompts, prompt_bytes=options.scale.prompt_bytes
            )
        trained, held_out = _train(config, corpus, on_event, timer)
        model = MultiTokenLM.from_pretrained(trained.model_directory).to(_device()).eval()
        comparisons = _generate(options, model, prompts, console, timer)
        result = _measure(options, model, held_out, comparisons, corpus, trained, console, timer)
    return _finish(options, result, timer, console)


def _train(
    config: TrainConfig, corpus: DemoCorpus, on_event: Listener | None, timer: PartTimer
) -> tuple[TrainResult, TokenCache]:
    captured: list[TrainingData] = []
    stages = [("encoding text, compiling layers", time.perf_counter())]

    def capture(data: TrainingData) -> list[Evaluator]:
        captured.append(data)
        return []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            stages.append(("training steps", time.perf_counter()))
        elif isinstance(event, RunEnded):
            stages.append(("saving the model", time.perf_counter()))
        if on_event is not None:
            on_event(event)

    trained = train(config, evaluators=capture, on_event=listen)
    ends = [*(moment for _, moment in stages[1:]), time.perf_counter()]
    for (stage, started), ended in zip(stages, ends, strict=True):
        timer.seconds[stage] = ended - started
    (data,) = captured
    check_same_text(corpus, train=data.train, held_out=data.held_out)
    assert data.held_out is not None, "check_same_text refuses a run without held-out text"
    return trained, data.held_out


def _generate(
    options: DemoOptions, model: MultiTokenLM, prompts: list[DemoPrompt], console: Console, timer: PartTimer
) -> tuple[Comparison, ...]:
    with timer.part("generating both ways"):
        # Uncounted: the first call of a process prepares kernels and imports.
        compare_prompt(model, prompts[0], max_new_tokens=8)
        comparisons = tuple(compare_prompt(model, prompt, max_new_tokens=options.scale.new_bytes) for prompt in prompts)
    with timer.part("showing the text"):
        show_comparisons(console, comparisons, seconds=options.scale.replay_seconds)
    console.print()
    console.print(Text.assemble(("all prompts  ", "bold"), verdict_line(comparisons)))
    console.print()
    return comparisons


def _measure(
    options: DemoOptions,
    model: MultiTokenLM,
    held_out: TokenCache,
    comparisons: tuple[Comparison, ...],
    corpus: DemoCorpus,
    trained: TrainResult,
    console: Console,
    timer: PartTimer,
) -> DemoResult:
    scale = options.scale
    config = options.training_config()
    windows = held_out_windows(
        held_out,
        sequence_length=config.sequence_length,
        max_windows=max(1, scale.evaluation_bytes // config.sequence_length),
    ).to(_device())
    with timer.part("held-out likelihood"):
        likelihood = evaluate_likelihood(
            model, windows.split(_ROWS_PER_FORWARD), bytes_per_token=held_out.bytes_per_token
        )
    with timer.part("loop-free acceptance"):
        walk = walk_acceptance(
            model,
            windows.input_ids_BT,
            position_ids_BT=windows.position_ids_BT,
            document_ids_BT=windows.document_ids_BT,
            rows_per_forward=_ROWS_PER_FORWARD,
        )
    generated = generated_acceptance(comparisons, num_draft_tokens=model.num_future_tokens - 1)
    with timer.part("measuring speed"):
        speed = measure_speed(
            model,
            [torch.tensor(comparison.prompt.tokens, device=_device()) for comparison in comparisons],
            max_new_tokens=scale.speed_new_bytes,
            repeats=scale.speed_repeats,
        )
    for table in (likelihood_table(likelihood), acceptance_table(walk, generated), speed_table(speed)):
        console.print(rich_table(table))
    console.print(speed_note(speed, walk))
    console.print()
    return DemoResult(
        corpus=corpus.summary,
        training=_training_summary(trained, model),
        likelihood=likelihood,
        walk=walk,
        comparisons=comparisons,
        generated=generated,
        speed=speed,
        seconds=timer.with_total(),
        options={
            "quick": options.quick,
            "steps": config.steps,
            "seed": options.seed,
            "threads": torch.get_num_threads(),
            "precision": config.precision,
            "compile": config.compile,
        },
        provenance=provenance(),
    )


def _training_summary(trained: TrainResult, model: MultiTokenLM) -> TrainingSummary:
    records = read_metrics(trained.output / METRICS)
    return TrainingSummary(
        recipe=RECIPE,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=trained.elapsed_seconds,
        tokens_per_second=trained.tokens_per_second or float("nan"),
        parameters=trained.num_parameters,
        head_parameters=sum(parameter.numel() for parameter in model.heads.parameters()),
        num_future_tokens=model.num_future_tokens,
        curve=tuple(
            CurvePoint(int(record["step"]), tuple(record["loss_per_offset"]))
            for record in records
            if record["loss_per_offset"] is not None
        ),
    )


def _finish(options: DemoOptions, result: DemoResult, timer: PartTimer, console: Console) -> FinishedDemo:
    report = options.folder / REPORT
    with timer.part("writing the report"):
        write_report(replace(result, seconds=timer.with_total()), report)
    result = replace(result, seconds=timer.with_total())
    write_json(options.folder / RESULT, result.to_json())
    finish_folder(options.folder)
    console.print(rich_table(time_table(result.seconds)))
    return FinishedDemo(result=result, report=report)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
