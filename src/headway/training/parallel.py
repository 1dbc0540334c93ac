"""How one model is trained by several processes: not at all, as replicas (DDP), or in shards (FSDP2).

Every process takes other rows of a step. The loss of a process is the sum over its targets, divided by the targets of all
processes, so that gradients are summed over processes, not averaged: the loss and the gradients are those of one process
with all rows, whatever their cut into processes and micro-batches.

    none   one process
    ddp    every process has all weights, gradients and moments; gradients are summed once per step, in the last
           micro-batch's backward
    fsdp   every process has a part of each weight, gradient and moment (`fully_shard`): a layer's weights are gathered for
           its forward and its backward, and its gradients summed into shards in the backward of every micro-batch, so that
           no process ever holds all gradients

The heads' bodies and the base's layers are sharded one by one. Embedding, unembeddings and final norm belong to the whole
model, since the loss multiplies by them outside their own forward (see `headway.losses.chunked`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from headway.errors import ConfigError
from headway.model.multi_token_lm import MultiTokenLM
from headway.processes import Processes
from headway.training.config import TrainConfig
from headway.training.loss_options import weight_plan
from headway.training.muon_sharing import ReplicatedSharing, ShardedSharing, own_rows

Mode = Literal["none", "ddp", "fsdp"]

_CLIP_FLOOR = 1e-6  # as torch.nn.utils.clip_grads_with_norm_ has it


class Parallel:
    """A model in one process; the other ways are subclasses with the same methods.

    Attributes:
        mode: how.
        model: the model itself, to evaluate, to save and to name parameters; never called to train.
        processes: who trains.
        sharing: how Muon divides its matrices among processes; None where there is one.
    """

    mode: Mode = "none"

    def __init__(self, model: MultiTokenLM, processes: Processes | None = None) -> None:
        self.model = model
        self.processes = processes or Processes()
        self.sharing: ReplicatedSharing | ShardedSharing | None = None
        self._callable: nn.Module = model

    def forward(self, **inputs: Any) -> Any:
        """The model's forward, so that the backward of what it gives leaves the sum over processes in the gradients."""
        return self._callable(**inputs)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """A block around forward and backward of one micro-batch; `last` of the step or not."""
        return nullcontext()

    def gradient_norm(self, parameters: list[nn.Parameter]) -> float:
        """Of all gradients together; NaN or infinite where one of them is, in every process alike."""
        return float(torch.nn.utils.get_total_norm(_gradients(parameters)))

    def clip_gradients(self, parameters: list[nn.Parameter], *, limit: float, norm: float) -> None:
        """Scale gradients whose `gradient_norm` is `norm` down to `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
        gradients = [own_rows(gradient) for gradient in _gradients(parameters)]
        torch._foreach_mul_(gradients, min(1.0, limit / (norm + _CLIP_FLOOR)))

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights in every process inside the block, so that each can use the model on its own, without training."""
        yield

    @property
    def needs_whole_state(self) -> bool:
        """Whether this process has to read what it passes to `load_whole_state`."""
        return True

    def whole_state(self) -> dict[str, Tensor]:
        """The state dict with whole tensors in the main process, in host memory where they were sharded; all call this.

        Empty in the other processes.
        """
        return cast(dict[str, Tensor], self.model.state_dict()) if self.processes.is_main else {}

    def load_whole_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `whole_state` gave; all call this."""
        self.model.load_state_dict(state)


class Replicated(Parallel):
    """DDP: see the module's text."""

    mode = "ddp"

    def __init__(self, model: MultiTokenLM, processes: Processes, *, heads_may_rest: bool) -> None:
        """Wrap `model`, which is on its device.

        Args:
            model: the same weights in every process; those of rank 0 win.
            processes: who trains.
            heads_may_rest: whether a step may leave parameters without a gradient; finding them costs a walk over the
                graph, so it is done only then.
        """
        super().__init__(model, processes)
        device = next(model.parameters()).device
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=heads_may_rest,
        )
        # The loss is divided by the targets of all processes already: sums, not means.
        self._ddp.register_comm_hook(None, _summed)
        self._callable = self._ddp
        self.sharing = ReplicatedSharing(_world())

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """No exchange before the last micro-batch."""
        return nullcontext() if last else self._ddp.no_sync()


class Sharded(Parallel):
    """FSDP2: see the module's text."""

    mode = "fsdp"

    def __init__(self, model: MultiTokenLM, processes: Processes, device: torch.device) -> None:
        """Shard `model` in place.

        Args:
            model: whole, the same weights in every process, in host memory or on its device.
            processes: who trains.
            device: where the shards go.
        """
        super().__init__(model, processes)
        mesh = init_device_mesh(device.type, (processes.count,))
        for module in sharded_parts(model):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in self._parts:
            # Sums, for the same reason as above.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._group = mesh.get_group()
        self.sharing = ShardedSharing(self._group)
        self._begin(device)

    def _begin(self, device: torch.device) -> None:
        """One pass through the whole model: the first module that runs is FSDP2's root, and evaluations run parts."""
        with torch.no_grad():
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        # Without a backward the whole model's own weights stay gathered, and no optimizer would see their shards.
        cast(FSDPModule, self.model).reshard()

    def gradient_norm(self, parameters: list[nn.Parameter]) -> float:
        """From the norms of the shards."""
        gradients = [own_rows(gradient) for gradient in _gradients(parameters)]
        square = torch.nn.utils.get_total_norm(gradients).double() ** 2
        dist.all_reduce(square, group=self._group)
        return math.sqrt(float(square)) if torch.isfinite(square) else math.inf

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gather all weights and keep them: afterwards no forward exchanges anything until the end of the block.

        Takes the memory of all weights in every process.
        """
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                # The whole model's own weights are used last and first: they stay between forward and backward.
                part.set_reshard_after_forward(part is not self.model, recurse=False)
                part.reshard()

    @property
    def needs_whole_state(self) -> bool:
        """The main process's is sent to the others."""
        return self.processes.is_main

    def whole_state(self) -> dict[str, Tensor]:
        """Gathered tensor after tensor into host memory."""
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]

    def load_whole_state(self, state: Mapping[str, Tensor]) -> None:
        """The main process's tensors, cut and sent to all."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(state), options=options)


def sharded_parts(model: MultiTokenLM) -> list[nn.Module]:
    """The modules that are gathered and freed on their own, inner ones first."""
    layers = [*model.family.layers, *model.heads.decoder_layers]
    # A list of layers is never called itself: its layers are.
    bodies = [body for body in model.heads if not isinstance(body, nn.ModuleList) and body not in layers]
    return [*layers, *bodies]


def parallel_mode(wanted: Literal["auto", "none", "ddp", "fsdp"], *, count: int) -> Mode:
    """What `parallel` comes to on `count` processes.

    Raises:
        ConfigError: a way that does not fit the number of processes.
    """
    if count == 1:
        if wanted in ("ddp", "fsdp"):
            raise ConfigError(
                f"parallel={wanted} needs several processes: got one; start it with 'torchrun --nproc-per-node N -m "
                f"headway train ...', or pass --parallel none"
            )
        return "none"
    if wanted == "none":
        raise ConfigError(
            f"parallel=none would train the same model {count} times over; pass --parallel ddp or fsdp, or start it "
            f"without torchrun"
        )
    return "ddp" if wanted == "auto" else wanted


def heads_may_rest(config: TrainConfig) -> bool:
    """Whether a step of this run may leave some heads without a gradient, because their loss has no weight then."""
    return config.num_future_tokens > 1 and weight_plan(config).heads_may_rest


def parallelize(
    model: MultiTokenLM, mode: Mode, processes: Processes, device: torch.device, *, heads_may_rest: bool
) -> Parallel:
    """Put a model on its device, in the way that `mode` says; its parameters are what an optimizer takes afterwards.

    Args:
        model: the same weights in every process.
        mode: from `parallel_mode`.
        processes: who trains.
        device: of this process.
        heads_may_rest: whether a step may leave some heads without a gradient.
    """
    if mode == "fsdp":
        # Part by part: a model that fits in host memory only is never on the device as a whole.
        return Sharded(model, processes, device)
    model.to(device)
    if mode == "ddp":
        return Replicated(model, processes, heads_may_rest=heads_may_rest)
    return Parallel(model, processes)


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


# DDP looks at these annotations themselves, so they must not be strings: no `from __future__ import annotations` here.
def _summed(
    state: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "this process is part of the group"
    return cast(torch.futures.Future[Tensor], work.get_future().then(lambda future: future.value()[0]))


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "joined"
    return group
