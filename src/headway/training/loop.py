"""The training loop: native PyTorch, one process, exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headway.data.tokenizers import load_tokenizer
from headway.errors import ConfigError
from headway.provenance import provenance
from headway.training.best import read_best
from headway.training.checkpoint import RunState
from headway.training.config import TrainConfig
from headway.training.config_file import to_yaml
from headway.training.corpus import TrainingData, describe_passes, prepare_data, with_steps
from headway.training.events import (
    Listener,
    Notice,
)
from headway.training.final_model import write_final_model
from headway.training.identity import check_same_run, run_identity
from headway.training.metric_files import read_metrics
from headway.training.metrics import MetricsWriter
from headway.training.model_building import base_config
from headway.training.optimizers import TrainingOptimizer
from headway.training.out_of_memory import out_of_memory_explained
from headway.training.rng import preserved_rng, seed_everything
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
from headway.training.starting_model import starting_model
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
    announce: Listener = on_event or (lambda event: None)
    with preserved_rng(), thread_count(config.threads), claimed(config) as folder:
        start = begin(folder, config)
        for text in start.notices:
            announce(Notice(text))
        device = _device(config)
        tokenizer = load_tokenizer(config.tokenizer_name)
        shape = base_config(config, tokenizer)
        write_text(folder / CONFIG, to_yaml(config))
        data = prepare_data(
            config,
            tokenizer,
            Path(config.cache_directory) if config.cache_directory else folder / TOKENS,
            notice=lambda text: announce(Notice(text)),
        )
        rows = data.rows(sequence_length=config.sequence_length, seed=config.seed)
        config = with_steps(config, rows)
        write_text(folder / CONFIG, to_yaml(config))
        announce(Notice(describe_passes(config, rows)))
        identity = run_identity(
            base_config=shape,
            num_future_tokens=config.num_future_tokens,
            tokenizer_fingerprint=data.tokenizer_fingerprint,
            data_fingerprint=data.fingerprint,
            held_out_fingerprint=None if data.held_out is None else data.held_out.fingerprint,
        )
        if start.checkpoint is not None:
            changes = check_same_run(
                start.checkpoint.identity,
                start.checkpoint.config,
                identity=identity,
                config=config,
                source=str(start.checkpoint.path),
            )
            if changes:
                announce(Notice(f"resuming with changed options: {'; '.join(changes)}"))
        telemetry = Telemetry(config, shape, rows=rows, device=device)
        seed_everything(config.seed)
        with out_of_memory_explained(config, lambda: "building the model"):
            model = starting_model(config, shape).to(device)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = TrainingOptimizer(model, config)
        state = RunState()
        if start.checkpoint is not None:
            start.checkpoint.restore(model, optimizer)
            state = start.checkpoint.state
        metrics = MetricsWriter(
            folder,
            resumed_step=state.step,
            tensorboard=config.tensorboard,
            open_tracker=tracker_opener(config, notice=lambda text: announce(Notice(text))),
        )
        try:
            run = TrainingRun(
                config=config,
                folder=folder,
                model=model,
                optimizer=optimizer,
                data=data,
                rows=rows,
                identity=identity,
                state=state,
                evaluators=evaluators(data) if callable(evaluators) else evaluators,
                metrics=metrics,
                announce=announce,
                telemetry=telemetry,
            )
            run.to_the_end()
            return _finish(run)
        finally:
            metrics.close()


def _finish(run: TrainingRun) -> TrainResult:
    """Write the model, then the result, whose presence says that the run is finished."""
    directory = run.folder / MODEL
    run.model.eval()
    write_final_model(run.model, run.data.tokenizer, directory)
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


def _device(config: TrainConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device={config.device} is none that torch knows; pass auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device={config.device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; pass "
            "--device cpu"
        )
    return device
