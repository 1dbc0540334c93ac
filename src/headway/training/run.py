"""The steps of a run: from the first, or the one after a checkpoint, to the last or to a signal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headway.data.loader import PackedLoader
from headway.data.packing import Rows
from headway.data.prefetch import PrefetchingLoader
from headway.errors import TrainingError
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.best import best_of, better, parse_figure
from headway.training.checkpoint import RunState, checkpoint_path, write_checkpoint
from headway.training.compilation import LayerCompiler, compile_layers
from headway.training.config import TrainConfig
from headway.training.corpus import TrainingData
from headway.training.events import (
    CheckpointWritten,
    EvaluationDone,
    Event,
    Listener,
    Notice,
    RunEnded,
    RunStarted,
    StepDone,
)
from headway.training.fields import field_specs
from headway.training.interruption import StopRequest, TrainingInterruptedError, stop_on_signals
from headway.training.loss_options import weight_plan
from headway.training.lost_process import lost_process_explained
from headway.training.metric_files import read_metrics
from headway.training.metrics import MetricsWriter
from headway.training.optimizers import TrainingOptimizer
from headway.training.out_of_memory import out_of_memory_explained
from headway.training.parallel import Parallel
from headway.training.rng import capture_rng, preserved_rng, restore_rng
from headway.training.run_directory import CHECKPOINTS, EVALUATIONS
from headway.training.schedule import learning_rate_factor
from headway.training.step import StepOutcome, optimizer_step
from headway.training.step_shape import StepShape
from headway.training.telemetry import Telemetry

Evaluator = Callable[[MultiTokenLM, int], Mapping[str, Any]]
"""(model in eval mode, steps done) -> figures: numbers, or lists of numbers with one item per offset."""


class TrainingRun:
    """One process's part of a run: from its first step to the last one, or to a signal."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        folder: Path,
        model: MultiTokenLM,
        optimizer: TrainingOptimizer,
        data: TrainingData,
        rows: Rows,
        identity: Mapping[str, Any],
        state: RunState,
        evaluators: Sequence[Evaluator],
        metrics: MetricsWriter | None,
        announce: Listener,
        telemetry: Telemetry,
        parallel: Parallel,
        shape: StepShape,
    ) -> None:
        self.config, self.folder, self.data, self.identity = config, folder, data, identity
        self.model, self.optimizer, self.evaluators = model, optimizer, evaluators
        self.metrics, self.announce, self.telemetry = metrics, announce, telemetry
        self.parallel, self.processes, self.shape = parallel, parallel.processes, shape
        self.state = state
        self.weights = weight_plan(config)
        self.device = next(model.parameters()).device
        loader = PackedLoader(
            rows,
            batch_size=shape.rows_per_process,
            num_replicas=shape.processes,
            rank=self.processes.rank,
        )
        self.loader = PrefetchingLoader(loader, workers=config.loader_workers) if config.loader_workers else loader
        self.resumed_from_step = state.step or None
        self.elapsed_before = state.elapsed_seconds
        self.began = time.perf_counter()
        # The step whose checkpoint is known to be on disk, so that a signal does not write it twice.
        there = self.processes.on_main(lambda: checkpoint_path(folder / CHECKPOINTS, state.step).exists())
        self.saved_step = state.step if there else None
        evaluations = self.processes.on_main(lambda: read_metrics(folder / EVALUATIONS))
        self.evaluated_step = evaluations[-1]["step"] if evaluations else None
        self.figure = None if config.keep_best is None else parse_figure(config.keep_best)
        self.best = None if self.figure is None else best_of(evaluations, self.figure)
        self.interval = _Stopwatch()
        self.whole = _Stopwatch()

    @property
    def elapsed_seconds(self) -> float:
        """Of the whole run up to now, earlier processes included."""
        return self.elapsed_before + time.perf_counter() - self.began

    @property
    def _tokens(self) -> int:
        """Training tokens of all processes together so far."""
        return self.state.next_row * self.config.sequence_length

    def emit(self, event: Event) -> None:
        """Tell the files first, then whoever watches; only the main process has either."""
        if self.metrics is not None:
            self.metrics(event)
        self.announce(event)

    def to_the_end(self) -> None:
        """Do the remaining steps with their evaluations and checkpoints.

        Raises:
            TrainingInterruptedError: a signal came; the state is saved.
            TrainingError: the loss stays non-finite.
        """
        compiler = self._compiler()
        if (changes := self.weights.describe()) is not None:
            self.emit(Notice(changes))
        self.emit(
            RunStarted(
                first_step=self.state.step + 1,
                steps=self.config.steps,
                tokens_per_step=self.shape.tokens,
                num_future_tokens=self.config.num_future_tokens,
                parameters=sum(parameter.numel() for parameter in self.optimizer.parameters),
                flops_per_token=self.telemetry.flops_per_token,
                peak_flops_per_second=self.telemetry.peak_flops_per_second,
            )
        )
        finished = False
        try:
            with (
                stop_on_signals(second_interrupts=not self.processes.several) as stop,
                lost_process_explained(self.processes, self._doing),
                out_of_memory_explained(self.config, self._doing),
            ):
                while not finished:
                    # A run resumed where a signal left no time for its evaluation begins with it.
                    if not self._stopping(stop) and self._evaluation_is_due():
                        self._evaluate()
                    if self._stopping(stop):
                        self._interrupted(stop)
                    if self._checkpoint_is_due():
                        self.save()
                    finished = self.state.step >= self.config.steps
                    if not finished and not self._step(compiler, stop):
                        self._interrupted(stop)
        finally:
            self.loader.close()
            self.emit(RunEnded(finished))

    def _stopping(self, stop: StopRequest) -> bool:
        """Whether a signal has come to any process; they all ask at the same places, and all hear the same."""
        stop.signal_number = self.processes.largest(stop.signal_number or 0) or None
        return bool(stop)

    def _doing(self) -> str:
        if self._evaluation_is_due():
            return f"the evaluation after step {self.state.step}"
        return f"step {min(self.state.step + 1, self.config.steps)}"

    def _step(self, compiler: LayerCompiler | None, stop: StopRequest) -> bool:
        """Do one optimizer step; False where a signal cut it short and nothing happened."""
        config, began = self.config, time.perf_counter()
        step = self.state.step + 1
        rng = capture_rng()
        self.optimizer.set_learning_rate_factor(
            learning_rate_factor(
                step, steps=config.steps, warmup_steps=config.total_warmup_steps, decay_ratio=config.decay_ratio
            )
        )
        rows = self.loader.batch(self.state.next_row).to(self.device)
        with compiler.active() if compiler is not None else nullcontext():
            outcome = optimizer_step(
                self.model,
                self.optimizer,
                list(rows.split(config.batch_size)),
                precision=config.precision,
                gradient_clip=config.gradient_clip,
                offset_weights=self.weights.at(step),
                should_stop=lambda: self._stopping(stop),
                parallel=self.parallel,
            )
        if outcome is None:
            restore_rng(rng)
            return False
        seconds = time.perf_counter() - began
        self.interval.add(seconds, self.shape.tokens)
        self.whole.add(seconds, self.shape.tokens)
        self.state = RunState(
            step=step,
            next_row=self.state.next_row + self.loader.samples_per_batch,
            elapsed_seconds=self.elapsed_seconds,
            skipped_steps=self.state.skipped_steps + (not outcome.applied),
            skipped_in_a_row=0 if outcome.applied else self.state.skipped_in_a_row + 1,
        )
        self._report(outcome)
        return True

    def _report(self, outcome: StepOutcome) -> None:
        state, config = self.state, self.config
        logged = state.step % config.log_every_steps == 0 or state.step == config.steps
        tokens, speed = self._tokens, self.interval.per_second
        cost: dict[str, Any] = {}
        if logged:
            cost |= vars(self.telemetry.cost(tokens=tokens, rows=state.next_row, tokens_per_second=speed))
            cost["offset_weights"] = self.weights.at(state.step)
            cost["accuracy_per_offset"] = outcome.accuracy_per_offset
            cost["objective_per_offset"] = outcome.objective_per_offset
        self.emit(
            StepDone(
                step=state.step,
                tokens=tokens,
                loss=outcome.loss,
                loss_per_offset=outcome.loss_per_offset,
                learning_rate=self.optimizer.learning_rate,
                gradient_norm=outcome.gradient_norm,
                applied=outcome.applied,
                skipped_steps=state.skipped_steps,
                tokens_per_second=speed,
                elapsed_seconds=state.elapsed_seconds,
                logged=logged,
                auxiliary_loss=outcome.auxiliary_loss,
                **cost,
            )
        )
        if logged:
            self.interval = _Stopwatch()
        if outcome.applied:
            return
        what = "loss" if outcome.loss is None else "gradient"
        self.emit(Notice(f"warning: step {state.step} skipped: its {what} is not finite"))
        if state.skipped_in_a_row >= config.max_nonfinite_steps:
            error = TrainingError(
                f"the {what} was not finite for {state.skipped_in_a_row} steps in a row (max_nonfinite_steps="
                f"{config.max_nonfinite_steps}), the last one step {state.step}; lower learning_rate or use "
                f"precision float32, then start the command again to go on from the last checkpoint"
            )
            raise self.processes.same_everywhere(error)

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, self.config.eval_every_steps
        if not self.evaluators or every is None or step in (0, self.evaluated_step):
            return False
        return step % every == 0 or step >= self.config.steps

    def _checkpoint_is_due(self) -> bool:
        step, every = self.state.step, self.config.checkpoint_every_steps
        best = self.best is not None and self.best.step == step
        return best or step >= self.config.steps or (every is not None and step > 0 and step % every == 0)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        values: dict[str, Any] = {}
        with preserved_rng(), torch.no_grad(), self.parallel.whole_weights():
            self.model.eval()
            try:
                for evaluator in self.evaluators:
                    values |= evaluator(self.model, self.state.step)
            finally:
                self.model.train()
        # Figures decide which checkpoint is the best: one opinion for all.
        values = self.processes.from_main(values)
        self.optimizer.zero_grad()
        self.evaluated_step = self.state.step
        seconds = time.perf_counter() - began
        self.emit(EvaluationDone(self.state.step, values, seconds, self._tokens, self.telemetry.flops(self._tokens)))
        self._rank(values)

    def _rank(self, values: Mapping[str, Any]) -> None:
        """Note whether this evaluation is the best so far; its checkpoint is written next."""
        if self.figure is None:
            return
        if self.figure.name not in values and self.config.keep_best != field_specs(TrainConfig)["keep_best"].default:
            error = TrainingError(
                f"keep_best={self.config.keep_best} is none of the figures of this run's evaluations "
                f"({', '.join(values)}); name one of them, or set keep_best to none"
            )
            raise self.processes.same_everywhere(error)
        self.best = better(self.best, self.figure, step=self.state.step, figures=values)

    def save(self) -> Path:
        """Write the checkpoint of the steps done so far, unless it is there already."""
        began = time.perf_counter()
        folder = self.folder / CHECKPOINTS
        if self.saved_step == self.state.step:
            return checkpoint_path(folder, self.state.step)
        # The files must hold every line that the checkpoint's step implies before the checkpoint exists.
        if self.metrics is not None:
            self.metrics.flush()
        self.state = replace(self.state, elapsed_seconds=self.elapsed_seconds)
        path = write_checkpoint(
            folder,
            model=self.model,
            tokenizer=self.data.tokenizer,
            optimizer=self.optimizer,
            state=self.state,
            config=self.config.to_dict(),
            identity=self.identity,
            keep=self.config.keep_checkpoints,
            best=self.best,
            parallel=self.parallel,
            step=self.shape.to_json(),
        )
        self.saved_step = self.state.step
        self.emit(CheckpointWritten(self.state.step, path, time.perf_counter() - began))
        return path

    def _interrupted(self, stop: StopRequest) -> None:
        assert stop.signal_number is not None
        raise TrainingInterruptedError(stop.signal_number, step=self.state.step, checkpoint=self.save())

    def _compiler(self) -> LayerCompiler | None:
        layers = [*self.model.family.layers, *self.model.heads.decoder_layers]
        row = self.loader.batch(self.state.next_row).to(self.device)
        return compile_layers(
            self.config.compile,
            self.model,
            layers,
            next(row.split(self.config.batch_size)),
            precision=self.config.precision,
            notice=lambda text: self.emit(Notice(text)),
        )


class _Stopwatch:
    """Tokens over the seconds that were spent on them."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
