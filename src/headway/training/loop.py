"""The training loop: native PyTorch, one process or many, exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headway.data.tokenizers import load_tokenizer
from headway.processes import Processes
from headway.provenance import provenance
from headway.training.best import read_best
from headway.training.checkpoint import Checkpoint, RunState
from headway.training.config import TrainConfig
from headway.training.config_file import to_yaml
from headway.training.corpus import TrainingData, describe_passes, prepare_data, with_steps
from headway.training.distillation import check_teacher, set_objective
from headway.training.events import Event, Listener, Notice
from headway.training.final_model import write_final_model
from headway.training.identity import check_same_run, run_identity
from headway.training.launch import joined
from headway.training.lost_process import lost_process_explained
from headway.training.metric_files import read_metrics
from headway.training.metrics import MetricsWriter
from headway.training.model_building import base_config
from headway.training.optimizers import TrainingOptimizer
from headway.training.out_of_memory import out_of_memory_explained
from headway.training.parallel import Mode, heads_may_rest, parallel_mode, parallelize
from headway.training.rng import preserved_rng, seed_everything, separate_streams
from headway.training.run import Evaluator, TrainingRun
from headway.training.run_directory import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    MODEL,
    RESULT,
    TOKENS,
    begin,
    claimed,
    write_text,
)
from headway.training.starting_model import check_start, starting_model
from headway.training.step_shape import StepShape, alone, resumed_shape, step_shape
from headway.training.telemetry import Telemetry
from headway.training.threads import thread_count
from headway.training.tracking import tracker_opener

EvaluatorFactory = Callable[[TrainingData], Sequence[Evaluator]]
"""Makes evaluators once the data are there, for those that need held-out text."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        model_directory: a plain headway model folder with its tokenizer.
        output: the run's folder.
        steps: optimizer steps, skipped ones included.
        tokens: input tokens.
        num_parameters: trained weights, tied ones once.
        loss: of the last step; None where it was not finite.
        loss_per_offset: of the last step, mean nats.
        skipped_steps: without an update because of a non-finite loss or gradient.
        elapsed_seconds: of the whole run, resumes included.
        tokens_per_second: of the steps done by this process; None where it did none.
        resumed_from_step: None for a run that was not interrupted.
        evaluation: figures after the last step; empty without evaluators.
        best: step, figure, value and folder name of the best checkpoint; None where none was evaluated.
    """

    model_directory: Path
    output: Path
    steps: int
    tokens: int
    num_parameters: int
    loss: float | None
    loss_per_offset: tuple[float, ...] | None
    skipped_steps: int
    elapsed_seconds: float
    tokens_per_second: float | None
    resumed_from_step: int | None
    evaluation: Mapping[str, Any]
    best: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self) | {"model_directory": str(self.model_directory), "output": str(self.output)}


def train(
    config: TrainConfig,
    *,
    evaluators: Sequence[Evaluator] | EvaluatorFactory = (),
    on_event: Listener | None = None,
) -> TrainResult:
    """Train a model, from scratch or from `init_from`, or continue the unfinished run in the output folder.

    The same configuration on the same machine gives the same weights, bit for bit, whether the run was killed and
    resumed or not, and whether it was evaluated or not. The global random generators and torch's thread count are
    afterwards as they were before.

    Started by `torchrun`, or with a default process group that is there already, every process calls this with the same
    arguments; the first of them writes and speaks for all.

    Args:
        config: everything; see `TrainConfig`.
        evaluators: run every `eval_every_steps` and at the end; they can change neither random state nor training.
        on_event: hears of every step, evaluation, checkpoint and finding; see `headway.training.events`.

    Returns:
        The finished run.

    Raises:
        ConfigError: a model that cannot be built, or a device or compiler that is not there.
        DataError: text or tokenizer cannot be used.
        CheckpointError: a damaged checkpoint, or a disk that refuses.
        TrainingError: the output folder belongs to something else, the run to resume is another one, or the loss stays
            non-finite. `TrainingInterruptedError` after a SIGINT or SIGTERM: saved, ready to be resumed.
    """
    with (
        preserved_rng(),
        thread_count(config.threads),
        joined(config.device) as (processes, device),
        lost_process_explained(processes, lambda: "preparing or ending the run"),
        ExitStack() as held,
    ):
        announce: Listener = on_event if on_event is not None and processes.is_main else _nothing
        mode = parallel_mode(config.parallel, count=processes.count)
        folder = processes.on_main(lambda: held.enter_context(claimed(config)))
        start = processes.on_main(lambda: begin(folder, config))
        for text in start.notices:
            announce(Notice(text))
        tokenizer = processes.main_first(lambda: load_tokenizer(config.tokenizer_name))
        shape = processes.together(lambda: base_config(config, tokenizer))
        processes.together(lambda: check_start(config))
        if config.teacher is not None:
            teacher = config.teacher
            processes.main_first(lambda: check_teacher(teacher, tokenizer))
        processes.on_main(lambda: write_text(folder / CONFIG, to_yaml(config)))
        data = processes.main_first(
            lambda: prepare_data(
                config,
                tokenizer,
                Path(config.cache_directory) if config.cache_directory else folder / TOKENS,
                notice=lambda text: announce(Notice(text)),
            )
        )
        rows = data.rows(sequence_length=config.sequence_length, seed=config.seed)
        steps, notices = processes.together(lambda: _step_shape(config, start.checkpoint, processes, mode))
        for text in notices:
            announce(Notice(text))
        config = processes.together(lambda: with_steps(config, rows, rows_per_step=steps.rows))
        processes.on_main(lambda: write_text(folder / CONFIG, to_yaml(config)))
        announce(Notice(describe_passes(config, rows, rows_per_step=steps.rows)))
        identity = run_identity(
            base_config=shape,
            num_future_tokens=config.num_future_tokens,
            tokenizer_fingerprint=data.tokenizer_fingerprint,
            data_fingerprint=data.fingerprint,
            held_out_fingerprint=None if data.held_out is None else data.held_out.fingerprint,
        )
        changes = processes.together(lambda: _changes(config, identity, start.checkpoint))
        if changes:
            announce(Notice(f"resuming with changed options: {'; '.join(changes)}"))
        telemetry = Telemetry(config, shape, rows=rows, device=device)
        seed_everything(config.seed)
        with out_of_memory_explained(config, lambda: "building the model"):
            # The same seed, so the same weights in every process.
            model = processes.together(lambda: starting_model(config, shape))
            if config.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
            processes.main_first(lambda: set_objective(config, model, tokenizer, device=device))
            parallel = parallelize(model, mode, processes, device, heads_may_rest=heads_may_rest(config))
        optimizer = TrainingOptimizer(model, config, sharing=parallel.sharing)
        state = RunState()
        if start.checkpoint is not None:
            start.checkpoint.restore(model, optimizer, parallel)
            state = start.checkpoint.state
        else:
            separate_streams(config.seed, processes.rank)
        written: list[MetricsWriter] = []
        processes.on_main(lambda: written.append(_metrics(config, folder, state, announce)))
        for metrics in written:
            held.callback(metrics.close)
        run = TrainingRun(
            config=config,
            folder=folder,
            model=model,
            optimizer=optimizer,
            data=data,
            rows=rows,
            identity=identity,
            state=state,
            evaluators=processes.together(lambda: evaluators(data) if callable(evaluators) else evaluators),
            metrics=written[0] if written else None,
            announce=announce,
            telemetry=telemetry,
            parallel=parallel,
            shape=steps,
        )
        run.to_the_end()
        return _finish(run)


def _nothing(event: Event) -> None:
    """What is heard in a process that does not speak."""


def _step_shape(
    config: TrainConfig, checkpoint: Checkpoint | None, processes: Processes, mode: Mode
) -> tuple[StepShape, list[str]]:
    """The cut of a step, and what a person should know of it."""
    shape, kept = step_shape(config, processes=processes.count), None
    if checkpoint is not None:
        saved_config = checkpoint.config
        saved = checkpoint.step or alone(saved_config)
        shape, kept = resumed_shape(config, processes=processes.count, saved_config=saved_config, saved_step=saved)
    ways = {"ddp": "replicas (ddp)", "fsdp": "shards (fsdp)", "none": ""}
    told = [f"{processes.count} processes train {ways[mode]} of one model"] if processes.several else []
    return shape, told if kept is None else [*told, kept]


def _changes(config: TrainConfig, identity: Mapping[str, Any], checkpoint: Checkpoint | None) -> list[str]:
    if checkpoint is None:
        return []
    return check_same_run(
        checkpoint.identity, checkpoint.config, identity=identity, config=config, source=str(checkpoint.path)
    )


def _metrics(config: TrainConfig, folder: Path, state: RunState, announce: Listener) -> MetricsWriter:
    return MetricsWriter(
        folder,
        resumed_step=state.step,
        tensorboard=config.tensorboard,
        open_tracker=tracker_opener(config, notice=lambda text: announce(Notice(text))),
    )


def _finish(run: TrainingRun) -> TrainResult:
    """Write the model, then the result, whose presence says that the run is finished; all processes call this."""
    run.model.eval()
    weights = run.parallel.whole_state()
    return run.processes.on_main(lambda: _written(run, weights))


def _written(run: TrainingRun, weights: Mapping[str, Tensor]) -> TrainResult:
    directory = run.folder / MODEL
    write_final_model(run.model, run.data.tokenizer, directory, state_dict=weights)
    assert run.metrics is not None, "the main process has files"
    run.metrics.flush()
    # Read back, not remembered: after a resume the last step may have been another process's.
    last = read_metrics(run.folder / METRICS)[-1]
    evaluations = [e for e in read_metrics(run.folder / EVALUATIONS) if e["step"] == run.state.step]
    result = TrainResult(
        model_directory=directory,
        output=run.folder,
        steps=run.state.step,
        tokens=run.state.next_row * run.config.sequence_length,
        num_parameters=sum(parameter.numel() for parameter in run.optimizer.parameters),
        loss=last["loss"],
        loss_per_offset=None if last["loss_per_offset"] is None else tuple(last["loss_per_offset"]),
        skipped_steps=run.state.skipped_steps,
        elapsed_seconds=run.elapsed_seconds,
        tokens_per_second=run.whole.per_second or None,
        resumed_from_step=run.resumed_from_step,
        evaluation=evaluations[-1] if evaluations else {},
        best=read_best(run.folder / CHECKPOINTS),
    )
    write_text(
        run.folder / RESULT,
        json.dumps(result.to_json() | {"provenance": provenance()}, indent=2, allow_nan=False) + "\n",
    )
    return result
