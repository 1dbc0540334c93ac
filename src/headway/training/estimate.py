"""What a run will take, before anything is allocated: parameters, memory, steps and tokens.

Legend: B rows of a micro-batch, T positions, D width, V vocabulary, N future tokens.

Activations are not guessed by a formula: the real model runs its forward on torch's fake tensors, which have shapes but
no data, and what autograd would keep for the backward pass is added up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from headway.data.tokenizers import load_tokenizer
from headway.heads.auxiliary import RegisterTokens, TokenOrderHead
from headway.model.memory import model_footprint
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.devices import Device
from headway.training.distillation import teacher_bytes
from headway.training.layouts import Layout, MemoryEstimate, exchanged_bytes, layouts, of_one_device
from headway.training.model_building import base_config, fresh_model
from headway.training.optimizers import parameter_kinds
from headway.training.parallel import Mode, parallel_mode
from headway.training.precision import forward_precision
from headway.training.step_shape import step_shape
from headway.training.step_time import StepTime, estimate_step_time
from headway.training.telemetry import count_flops

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainingPlan:
    """What `headway train --dry-run` shows.

    Attributes:
        total_parameters: every weight once, heads included.
        non_embedding_parameters: without embedding and unembedding.
        head_parameters: heads of offsets 2..n.
        vocabulary_size: tokens.
        parallel: how the processes share the model.
        processes: that train it, one device each.
        memory: of one device at the peak of a step, as the configuration says it.
        layouts: the same for every way of sharing the model among the processes, without and with checkpointing.
        flops_per_token: of forward and backward; None for a model that cannot be counted.
        steps: optimizer steps; None where epochs are asked for, whose steps only the text can tell.
        warmup_steps: of them.
        micro_batches: of each process in a step.
        tokens_per_step: input tokens of all processes together.
        tokens: of the whole run.
    """

    total_parameters: int
    non_embedding_parameters: int
    head_parameters: int
    vocabulary_size: int
    parallel: Mode
    processes: int
    memory: MemoryEstimate
    layouts: tuple[Layout, ...]
    flops_per_token: int | None
    steps: int | None
    warmup_steps: int | None
    micro_batches: int
    tokens_per_step: int
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        """All fields, with the totals of memory, JSON-ready."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        for layout, record in zip(self.layouts, values["layouts"], strict=True):
            record["memory"]["total"] = layout.memory.total
        return values

    def time_on(self, device: Device) -> StepTime | None:
        """How long a step takes there; None for a model whose operations cannot be counted."""
        if self.flops_per_token is None:
            return None
        chosen = next(layout for layout in self.layouts if layout.memory == self.memory)
        return estimate_step_time(
            device,
            flops_per_token=self.flops_per_token,
            tokens=self.tokens_per_step,
            processes=self.processes,
            weight_bytes=self.memory.weights,
            optimizer_bytes=self.memory.optimizer,
            gradient_checkpointing=chosen.gradient_checkpointing,
            exchanged_bytes=exchanged_bytes(
                self.total_parameters * _FLOAT32_BYTES,
                mode=self.parallel,
                processes=self.processes,
                micro_batches=self.micro_batches,
            ),
            steps=self.steps,
        )


def plan_training(config: TrainConfig, *, processes: int = 1) -> TrainingPlan:
    """Resolve a configuration to a model and count what it takes; no weight is allocated and no text is read.

    Args:
        config: of the run.
        processes: that `torchrun` would start, one device each.

    Raises:
        ConfigError: a model or a teacher that cannot be built, or a way of sharing it that does not fit the number of processes.
        DataError: no such tokenizer.
    """
    mode = parallel_mode(config.parallel, count=processes)
    shape = base_config(config, load_tokenizer(config.tokenizer_name))
    with torch.device("meta"):
        model = fresh_model(config, shape)
    footprint = model_footprint(model, dtype=torch.float32)
    activations = _activations(config, shape)
    whole = _memory(model, config, activations=activations[config.gradient_checkpointing][1])
    step = step_shape(config, processes=processes)
    known = config.epochs is None
    return TrainingPlan(
        total_parameters=footprint.total_parameters,
        non_embedding_parameters=footprint.non_embedding_parameters,
        head_parameters=footprint.head_parameters,
        vocabulary_size=shape.vocab_size,
        parallel=mode,
        processes=processes,
        memory=of_one_device(model, whole, mode=mode, processes=processes),
        layouts=layouts(model, whole, processes=processes, activations=activations),
        flops_per_token=count_flops(config, shape),
        steps=config.steps if known else None,
        warmup_steps=config.total_warmup_steps if known else config.warmup_steps,
        micro_batches=step.micro_batches,
        tokens_per_step=step.tokens,
        tokens=config.steps * step.tokens if known else None,
    )


def _memory(model: MultiTokenLM, config: TrainConfig, *, activations: int) -> MemoryEstimate:
    kinds = parameter_kinds(model)
    sizes = {name: parameter.numel() * _FLOAT32_BYTES for name, parameter in model.named_parameters()}
    weights = sum(sizes.values())
    moments = {name: 1 if config.optimizer == "muon" and kind == "matrix" else 2 for name, kind in kinds.items()}
    vocabulary, width = model.family.lm_head.weight.shape
    own = len(model.heads.unembeddings or ()) + isinstance(model.heads.auxiliary, TokenOrderHead)
    positions = config.batch_size * config.sequence_length
    compute_bytes = 4 if config.precision == "float32" else 2
    chunk = min(positions, config.loss_chunk_tokens)
    # The logits and one working copy of them in float32, and one in the type of the backward product.
    chunk_bytes = chunk * vocabulary * (2 * _FLOAT32_BYTES + (compute_bytes if compute_bytes == 2 else 0))
    hidden_bytes = model.num_future_tokens * positions * width * compute_bytes
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=sum(moments[name] * sizes[name] for name in kinds),
        activations=activations,
        loss=chunk_bytes + hidden_bytes + (1 + own) * vocabulary * width * _FLOAT32_BYTES,
        teacher=0 if config.teacher is None else teacher_bytes(config.teacher),
    )


def _activations(config: TrainConfig, shape: Any) -> tuple[tuple[bool, int], tuple[bool, int]]:
    """Bytes without and with gradient checkpointing."""
    with torch.device("meta"):
        # one of its own: becoming fake unties what is tied
        model = fresh_model(config, shape).train()
    # allow_non_fake_inputs: constants that a family's rotary embedding holds are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        kept = kept_for_backward(model, config)
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpoints = kept_for_backward(model, config)
    layers = len(model.family.layers) + len(model.heads.decoder_layers)
    return (False, kept), (True, checkpoints + (kept - checkpoints) // layers)


def kept_for_backward(model: MultiTokenLM, config: TrainConfig) -> int:
    """Bytes that autograd keeps after the forward of one micro-batch, weights not counted, each storage once."""
    kept = _kept(model, config, length=config.sequence_length, num_offsets=model.num_future_tokens)
    if isinstance(model.heads.auxiliary, RegisterTokens):
        # The base, and no head, runs on registers too.
        kept += _kept(model, config, length=2 * config.sequence_length, num_offsets=1)
        kept -= _kept(model, config, length=config.sequence_length, num_offsets=1)
    return kept


def _kept(model: MultiTokenLM, config: TrainConfig, *, length: int, num_offsets: int) -> int:
    weights = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    input_ids_BT = torch.zeros((config.batch_size, length), dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        forward_precision(model, config.precision),
    ):
        states = model.offset_hidden_states(
            input_ids_BT, use_cache=False, num_offsets=num_offsets, on_drafts=config.train_on_drafts
        )
        hidden = [model.before_unembedding(state_BTD, offset=k) for k, state_BTD in enumerate(states.hidden, start=1)]
    assert len(hidden) == num_offsets
    return sum(size for storage, (size, _) in kept.items() if storage not in weights)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
