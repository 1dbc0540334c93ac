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
from headway.model.memory import model_footprint
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.model_building import base_config, fresh_model
from headway.training.optimizers import parameter_kinds
from headway.training.precision import forward_precision

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process at the peak of a step.

    Attributes:
        weights: float32.
        gradients: float32.
        optimizer: AdamW's two moments, or Muon's one for the matrices.
        activations: what autograd keeps of one micro-batch for the backward pass, with the layer that is recomputed
            where gradient checkpointing is on.
        loss: the chunk of logits that is alive, gradients of N hidden states and of the unembeddings.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Sum of all; temporaries of the backward pass and of the framework come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class TrainingPlan:
    """What `headway train --dry-run` shows.

    Attributes:
        total_parameters: every weight once, heads included.
        non_embedding_parameters: without embedding and unembedding.
        head_parameters: heads of offsets 2..n.
        vocabulary_size: tokens.
        memory: at the peak of a step.
        steps: optimizer steps; None where epochs are asked for, whose steps only the text can tell.
        warmup_steps: of them.
        tokens_per_step: input tokens.
        tokens: of the whole run.
    """

    total_parameters: int
    non_embedding_parameters: int
    head_parameters: int
    vocabulary_size: int
    memory: MemoryEstimate
    steps: int | None
    warmup_steps: int | None
    tokens_per_step: int
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        """All fields, with the memory's total, JSON-ready."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Resolve a configuration to a model and count what it takes; no weight is allocated and no text is read.

    Raises:
        ConfigError: a model that cannot be built.
        DataError: no such tokenizer.
    """
    shape = base_config(config, load_tokenizer(config.tokenizer_name))
    with torch.device("meta"):
        model = fresh_model(config, shape)
    footprint = model_footprint(model, dtype=torch.float32)
    return TrainingPlan(
        total_parameters=footprint.total_parameters,
        non_embedding_parameters=footprint.non_embedding_parameters,
        head_parameters=footprint.head_parameters,
        vocabulary_size=shape.vocab_size,
        memory=_memory(model, config),
        steps=config.steps if config.epochs is None else None,
        warmup_steps=config.total_warmup_steps if config.epochs is None else config.warmup_steps,
        tokens_per_step=config.tokens_per_step,
        tokens=config.steps * config.tokens_per_step if config.epochs is None else None,
    )


def _memory(model: MultiTokenLM, config: TrainConfig) -> MemoryEstimate:
    kinds = parameter_kinds(model)
    sizes = {name: parameter.numel() * _FLOAT32_BYTES for name, parameter in model.named_parameters()}
    weights = sum(sizes.values())
    moments = {name: 1 if config.optimizer == "muon" and kind == "matrix" else 2 for name, kind in kinds.items()}
    vocabulary, width = model.family.lm_head.weight.shape
    own = len(model.heads.unembeddings or ())
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
        activations=_activations(model, config),
        loss=chunk_bytes + hidden_bytes + (1 + own) * vocabulary * width * _FLOAT32_BYTES,
    )


def _activations(model: MultiTokenLM, config: TrainConfig) -> int:
    model.train()
    # allow_non_fake_inputs: constants that a family's rotary embedding holds are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        kept = kept_for_backward(model, config)
        if not config.gradient_checkpointing:
            return kept
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpoints = kept_for_backward(model, config)
    layers = len(model.family.layers) + len(model.heads.decoder_layers)
    return checkpoints + (kept - checkpoints) // layers


def kept_for_backward(model: MultiTokenLM, config: TrainConfig) -> int:
    """Bytes that autograd keeps after the forward of one micro-batch, weights not counted, each storage once."""
    weights = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    input_ids_BT = torch.zeros((config.batch_size, config.sequence_length), dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        forward_precision(model, config.precision),
    ):
        states = model.offset_hidden_states(input_ids_BT, use_cache=False)
        hidden = [model.before_unembedding(state_BTD, offset=k) for k, state_BTD in enumerate(states.hidden, start=1)]
    assert len(hidden) == model.num_future_tokens
    return sum(size for storage, (size, _) in kept.items() if storage not in weights)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
