"""Steps captured as CUDA graphs: one per shape, made when it is first needed, replayed from then on.

Legend: M positions of a block.

A step launches some hundred kernels of a few microseconds each; a replayed graph launches them all at once, so that the
time of a step is the time of its kernels and not of the Python that asks for them.

Source: PyTorch's notes on CUDA graphs (torch.cuda.graph): warm up on a side stream, capture, replay; memory pools may be
shared by graphs that never run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.errors import DecodingError

WARM_UPS = 3
"""Steps before a capture: libraries choose their kernels and take their workspaces in the first ones."""

SMALLEST_SLOTS = 128
"""Below this, reading fewer keys saves nothing that a graph of its own would be worth."""

Step = Callable[[], None]


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller.

    >>> [power_of_two(number) for number in (1, 3, 4, 129)]
    [1, 4, 4, 256]
    """
    return 1 << (max(1, number) - 1).bit_length()


def slots_bucket(needed: int, capacity: int) -> int:
    """How many slots of the cache a step reads where so many are needed: a power of two, or all there are.

    >>> slots_bucket(5, 1000), slots_bucket(129, 1000), slots_bucket(600, 1000)
    (128, 256, 1000)
    """
    return min(capacity, max(SMALLEST_SLOTS, power_of_two(needed)))


@dataclass(frozen=True)
class StepShape:
    """What a captured step depends on.

    Attributes:
        batch: rows, a power of two.
        verified: drafted tokens of the block that it reads: M - 1.
        drafted: tokens that it drafts.
        slots: of the cache, that attention reads.
        choice: how tokens are chosen.
    """

    batch: int
    verified: int
    drafted: int
    slots: int
    choice: tuple[Any, ...]


class Capture(Protocol):
    """Turns a step into something that can be repeated."""

    def __call__(self, step: Step, prepare: Step) -> Callable[[Step], None]:
        """Capture a step.

        Args:
            step: reads and writes buffers that stay where they are; running it changes them.
            prepare: brings the buffers back to what they are now, before a step that only warms up.

        Returns:
            Called with the step that the caller would run now, repeats it.
        """


class OutsideReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, inside the block, every tensor that is read and was not made there.

    A graph holds addresses and no tensors: whatever it reads must live as long as it does.

    Attributes:
        tensors: one per storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()
        self._read: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """See the class."""
        return list(self._read.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it reads and makes."""
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs)):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made:
                self._read[address] = tensor
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(output)} - self._read.keys()
        return output


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class CapturedStep:
    """A graph, and what it reads.

    Attributes:
        graph: has captured a step.
        reads: tensors that have to stay where they are.
    """

    graph: torch.cuda.CUDAGraph
    reads: list[Tensor]

    def __call__(self, current: Step) -> None:
        """Replay it."""
        self.graph.replay()


class CudaCapture:
    """Captures on one device; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, step: Step, prepare: Step) -> Callable[[Step], None]:
        """See `Capture`."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                with OutsideReads() as reads:
                    step()
                    prepare()
                for _ in range(WARM_UPS - 1):
                    step()
                    prepare()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        self._pool = graph.pool()
        return CapturedStep(graph, reads.tensors)


class CompiledCapture:
    """Compiles a step first, so that runs of small operations become one kernel each; another capture captures the result.

    Fused operations round less often, so in bfloat16 a compiled step is exact against compiled steps without drafts only.
    """

    def __init__(self, then: Capture, *, backend: str = "inductor") -> None:
        """Compile for a capture.

        Args:
            then: captures the compiled step.
            backend: of torch.compile.
        """
        self._then = then
        self._backend = backend

    def __call__(self, step: Step, prepare: Step) -> Callable[[Step], None]:
        """See `Capture`."""
        function = cast(FunctionType, step)
        # A code object of its own: torch.compile limits how often it compiles the same one for other numbers.
        code = function.__code__.replace()
        own = FunctionType(code, function.__globals__, "step", function.__defaults__, function.__closure__)
        compiled = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)

        def run() -> None:
            # Decoding forbids compiling elsewhere, where every new length would compile again.
            with torch.compiler.set_stance("default"):
                compiled()

        return self._then(run, prepare)


def call_instead(step: Step, prepare: Step) -> Callable[[Step], None]:
    """A capture that captures nothing: every repetition runs the step, kernel by kernel, on any device."""
    return lambda current: current()


@dataclass
class GraphReport:
    """What captures cost.

    Attributes:
        captures: graphs made.
        replays: steps run.
        capture_seconds: spent making graphs, warm-ups included.
        pool_bytes: device memory that was reserved while graphs were made: their intermediate results.
    """

    captures: int = 0
    replays: int = 0
    capture_seconds: float = 0.0
    pool_bytes: int = 0


class StepGraphs:
    """The captured steps of one set of buffers.

    Attributes:
        report: what they cost.
    """

    def __init__(self, capture: Capture, device: torch.device) -> None:
        """None is captured yet.

        Args:
            capture: how.
            device: of the buffers.
        """
        self.report = GraphReport()
        self._capture = capture
        self._device = device
        self._replays: dict[StepShape, Callable[[Step], None]] = {}

    @property
    def shapes(self) -> list[StepShape]:
        """What has been captured, in the order in which it was needed."""
        return list(self._replays)

    def captures_like(self, capture: Capture) -> bool:
        """Whether another capture would do the same."""
        return (type(self._capture) is CudaCapture and type(capture) is CudaCapture) or self._capture is capture

    def run(self, shape: StepShape, step: Step, keep: Callable[[], Step]) -> None:
        """Run a step, from a graph.

        Args:
            shape: steps of one shape do the same with the same buffers.
            step: is captured where its shape is new.
            keep: notes what the buffers hold and returns what brings it back.
        """
        replay = self._replays.get(shape)
        if replay is None:
            replay = self._replays[shape] = self._made(step, keep)
        self.report.replays += 1
        replay(step)

    def _made(self, step: Step, keep: Callable[[], Step]) -> Callable[[Step], None]:
        begin, reserved = time.perf_counter(), self._reserved()
        bring_back = keep()
        replay = self._capture(step, bring_back)
        self.report.captures += 1
        self.report.capture_seconds += time.perf_counter() - begin
        self.report.pool_bytes += max(0, self._reserved() - reserved)
        return replay

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0


@dataclass(frozen=True)
class GraphSettings:
    """How the graph executor runs.

    Attributes:
        capture: what captures; None for CUDA graphs.
        ahead: steps that are asked for before the results of the oldest are looked at, beyond the one that is waited for: the
            device then never waits for the host's bookkeeping. At the end so many steps are run in vain.
    """

    capture: Capture | None = None
    ahead: int = 1


_settings: ContextVar[GraphSettings | None] = ContextVar("headway_graph_settings", default=None)


@contextmanager
def graph_settings(*, capture: Capture | None = None, ahead: int = 1) -> Iterator[None]:
    """Run the graph executor otherwise than on its own: for tests, rehearsals and benchmarks.

    Args:
        capture: `call_instead` runs the same steps un-captured, on any device; a `CompiledCapture` compiles them first; None
            captures CUDA graphs.
        ahead: see `GraphSettings.ahead`.
    """
    token = _settings.set(GraphSettings(capture, ahead))
    try:
        yield
    finally:
        _settings.reset(token)


def settings_for(device: torch.device) -> GraphSettings:
    """The settings in force, with a capture for the device.

    Raises:
        DecodingError: no CUDA device.
    """
    settings = _settings.get() or GraphSettings()
    if settings.capture is not None:
        return settings
    if device.type != "cuda":
        raise DecodingError(
            f"executor='graph' needs a CUDA device, whose graphs it captures: the model is on {device}; move it with "
            f"model.to('cuda'), or pass executor='lean'"
        )
    return GraphSettings(CudaCapture(device), settings.ahead)
