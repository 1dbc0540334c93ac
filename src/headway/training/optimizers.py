"""AdamW, and Muon with AdamW for the rest: one object with one state, keyed by parameter names.

Which parameter goes where (a parameter that two modules share is one parameter):

    kind        what                                                            adamw                 muon
    matrix      two-dimensional weights between hidden states                   AdamW, decayed        Muon, decayed
    embedding   token and position embeddings, unembeddings                     AdamW, decayed        AdamW, decayed
    vector      norms, biases                                                   AdamW, no decay       AdamW, no decay
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from headway.errors import CheckpointError
from headway.training.config import TrainConfig
from headway.training.muon import BatchedMuon
from headway.training.muon_sharing import ReplicatedSharing, ShardedSharing

ParameterKind = Literal["matrix", "embedding", "vector"]

_RESTING = "resting"
"""In place of a moment's name in the state of a parameter that has none."""


def parameter_kinds(model: Any) -> dict[str, ParameterKind]:
    """The kind of every parameter that is trained, by its name in `model.named_parameters()`.

    Args:
        model: a `MultiTokenLM`, or any model with Hugging Face's `get_output_embeddings`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {
        id(model.get_output_embeddings().weight)
    }
    heads = getattr(model, "heads", None)
    if heads is not None:
        embeddings |= {id(module.weight) for module in heads.vocabulary_matrices}
    kinds: dict[str, ParameterKind] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            kinds[name] = "embedding"
        else:
            kinds[name] = "matrix" if parameter.ndim == 2 else "vector"
    return kinds


class TrainingOptimizer:
    """The optimizer of a run.

    Moments are float32 like the weights. Settings come from the configuration, never from a saved state.
    """

    def __init__(
        self, model: Any, config: TrainConfig, *, sharing: ReplicatedSharing | ShardedSharing | None = None
    ) -> None:
        """Make empty state for the parameters of `model` that require gradients.

        Args:
            model: as it is trained: sharded already, where it is to be.
            config: of the run.
            sharing: how Muon divides its matrices among processes; see `headway.training.parallel`.
        """
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        kinds = parameter_kinds(model)
        muon = config.optimizer == "muon"
        rest_rate = config.learning_rate if config.adamw_learning_rate is None else config.adamw_learning_rate
        rest_decay = config.weight_decay if config.adamw_weight_decay is None else config.adamw_weight_decay
        rates = {"matrix": config.learning_rate, "embedding": rest_rate, "vector": rest_rate}
        decays = {"matrix": config.weight_decay, "embedding": rest_decay, "vector": 0.0}
        self._optimizers: list[torch.optim.Optimizer] = []
        adamw_groups: list[dict[str, Any]] = []
        for kind in get_args(ParameterKind):
            names = [name for name, value in kinds.items() if value == kind]
            if not names:
                continue
            group = {
                "params": [parameters[name] for name in names],
                "lr": rates[kind],
                "peak_learning_rate": rates[kind],
                "weight_decay": decays[kind],
            }
            if muon and kind == "matrix":
                self._optimizers.append(
                    BatchedMuon(
                        [group],
                        lr=config.learning_rate,
                        weight_decay=config.weight_decay,
                        momentum=config.muon_momentum,
                        sharing=sharing,
                    )
                )
            else:
                adamw_groups.append(group)
        if adamw_groups:
            self._optimizers.append(torch.optim.AdamW(adamw_groups, betas=config.betas, eps=config.eps, fused=True))
        self._parameters = parameters
        self._names = {parameter: name for name, parameter in parameters.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are trained."""
        return list(self._parameters.values())

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """They by their names in the model."""
        return dict(self._parameters)

    @property
    def learning_rate(self) -> float:
        """Of the matrices, as the next step will use it."""
        return float(self._optimizers[0].param_groups[0]["lr"])

    def set_learning_rate_factor(self, factor: float) -> None:
        """Use `factor` x each group's peak learning rate from the next step on."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_learning_rate"]

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as `moment/parameter name` -> tensor; empty before the first step.

        A parameter that has had no gradient yet, of a head that rests, has no moments; a number 0 says so.
        """
        state, resting = {}, {}
        for name, parameter in self._parameters.items():
            moments = self._state_of(parameter)
            for key, value in moments.items():
                state[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
            if not moments:
                resting[f"{_RESTING}/{name}"] = torch.zeros(())
        return state | resting if state else state

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, for a model with the same parameters.

        Raises:
            CheckpointError: a parameter that is not there, or a moment of another shape.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            moment, _, name = key.partition("/")
            if name not in self._parameters:
                raise CheckpointError(
                    f"the optimizer state holds {key}, but the model trains no parameter {name}; resume with the "
                    f"configuration that wrote it"
                )
            parameter = self._parameters[name]
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimizer state {key} has the shape {tuple(value.shape)}, its parameter "
                    f"{tuple(parameter.shape)}; resume with the configuration that wrote it"
                )
            # Adam's step counter stays on the CPU or follows the fused kernel's device: torch sorts that out on load.
            moments = by_parameter.setdefault(name, {})
            if moment != _RESTING:
                moments[moment] = value
        if by_parameter and by_parameter.keys() != self._parameters.keys():
            missing = sorted(self._parameters.keys() - by_parameter.keys())[0]
            raise CheckpointError(f"the optimizer state lacks the parameter {missing}; use another checkpoint")
        for optimizer in self._optimizers:
            saved = optimizer.state_dict()
            names = [self._names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            saved["state"] = {
                index: {moment: value.clone() for moment, value in by_parameter[name].items()}
                for index, name in enumerate(names)
                if by_parameter.get(name)
            }
            optimizer.load_state_dict(saved)

    def _state_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]  # type: ignore[no-any-return]
        return {}
