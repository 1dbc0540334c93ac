"""Graphs are made once per shape, kept from request to request, and what they cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper

from decoding_cases import ragged_batch
from graph_cases import graph_executor_on, right_at_times
from head_cases import head_model
from headway.decoding.blocks import stream_blocks
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.graphs.capture import (
    WARM_UPS,
    CapturedStep,
    CompiledCapture,
    CudaCapture,
    OutsideReads,
    StepGraphs,
    StepShape,
    call_instead,
    graph_settings,
)
from headway.decoding.graphs.executor import forget
from headway.decoding.graphs.loop import GraphLoop
from headway.decoding.graphs.state import RecordQueue, StepState
from headway.errors import DecodingError
from tiny_models import random_tokens, tiny_model


class CountingCapture:
    """Counts captures, and repeats what it captured as a graph would: the step as it was then, never the current one."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, step: Callable[[], None], prepare: Callable[[], None]) -> Callable[[Any], None]:
        self.captures += 1
        for _ in range(2):
            step()
            prepare()

        def replay(current: Any) -> None:
            self.replays += 1
            step()

        return replay


def run_loop(model: Any, lengths: tuple[int, ...], *, new: int, **options: Any) -> GraphLoop:
    """A generation step by step."""
    batch = ragged_batch(lengths, "l" * len(lengths))
    loop = ENGINE.start(
        model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new, executor="graph", **options
    )
    assert isinstance(loop, GraphLoop)
    with decoding_context(model):
        loop.run()
    return loop


def plain_tokens(model: Any, lengths: tuple[int, ...], *, new: int, **options: Any) -> list[list[int]]:
    """The same by the eager executor."""
    batch = ragged_batch(lengths, "l" * len(lengths))
    found = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new, pad_token_id=0, **options
    )
    return found[:, batch.input_ids.shape[1] :].tolist()


def test_one_graph_per_batch_draft_length_and_length_of_the_cache():
    model = head_model("transformer", dtype=torch.float64)
    capture = CountingCapture()
    with graph_settings(capture=capture, ahead=1):
        loop = run_loop(model, (109, 5, 3), new=40)
        shapes = loop.graphs.graphs.shapes
        assert [(shape.batch, shape.verified, shape.drafted, shape.slots) for shape in shapes] == [
            (4, 3, 3, 128),
            (4, 3, 3, 256),
        ]
        assert capture.captures == 2
        steps = max(len(row) for row in loop.rows) - 1
        assert steps <= capture.replays <= steps + 1  # one may have been asked for in vain
        assert [loop.new_tokens(row) for row in range(3)] == plain_tokens(model, (109, 5, 3), new=40)

        again = run_loop(model, (4, 7, 6, 2), new=20)
        assert capture.captures == 2
        assert again.graphs.graphs is loop.graphs.graphs
        assert [again.new_tokens(row) for row in range(4)] == plain_tokens(model, (4, 7, 6, 2), new=20)

        for drafts, captures in ((3, 3), (1, 4), (0, 5), (3, 5), (1, 5)):
            plain = run_loop(model, (4,), new=20, num_draft_tokens=drafts)
            assert [plain.new_tokens(0)] == plain_tokens(model, (4,), new=20)
            assert capture.captures == captures
    report = loop.graphs.graphs.report
    assert (report.captures, report.pool_bytes) == (2, 0)
    assert report.replays > steps
    assert report.capture_seconds > 0


def test_other_ways_to_draw_are_other_graphs_and_other_seeds_and_end_tokens_are_not():
    model = head_model("linear", dtype=torch.float64)
    capture = CountingCapture()
    with graph_settings(capture=capture, ahead=0):
        for request, captures in (
            ({"temperature": 0.7, "top_k": 5, "seed": 1}, 1),
            ({"temperature": 0.7, "top_k": 5, "seed": 2, "eos_token_id": [3, 4]}, 1),
            ({"temperature": 0.8, "top_k": 5, "seed": 1}, 2),
        ):
            loop = run_loop(model, (5, 9), new=12, do_sample=True, **request)
            expected = plain_tokens(model, (5, 9), new=12, do_sample=True, num_draft_tokens=0, **request)
            found = [loop.new_tokens(row) for row in range(2)]
            assert found == [row[: len(own)] for row, own in zip(expected, found, strict=True)]
            assert capture.captures == captures


def test_two_generations_at_a_time_do_not_share_buffers_and_changed_weights_are_read_again():
    model = head_model("sequential", dtype=torch.float64)
    ids = random_tokens(9)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    expected = model.generate(ids, **options)[0, 9:].tolist()
    with graph_settings(capture=CountingCapture(), ahead=1):
        streams = [stream_blocks(model, ids, executor="graph", **options) for _ in range(2)]
        found: list[list[int]] = [[], []]
        for _ in range(12):
            for stream, tokens in zip(streams, found, strict=True):
                tokens += next(stream, [[]])[0]
        assert found == [expected, expected]
        with torch.no_grad():
            model.base.lm_head.weight.neg_()
        assert model.generate(ids, executor="graph", **options).tolist() == model.generate(ids, **options).tolist()


@pytest.mark.parametrize("architecture", ["transformer", "linear-tap-markov", "sequential"])
def test_a_graph_keeps_whatever_its_step_reads_and_nothing_of_the_step_before(architecture: str):
    model = head_model(architecture, dtype=torch.float64)
    run = graph_executor_on(model)
    found = []
    with torch.inference_mode():
        run.begin()
        for _ in range(2):
            with OutsideReads() as reads:
                run.static_step(verified=3, drafted=3, slots=128)
            found.append({tensor.untyped_storage().data_ptr() for tensor in reads.tensors})
            held = list(reads.tensors)  # so that no address is taken again
    assert found[0] == found[1]
    expected = [run.state.block_BW, run.state.positions_B, run.cache.layers[0].keys, run._positions_BC]
    assert {tensor.untyped_storage().data_ptr() for tensor in [*expected, model.base.lm_head.weight]} <= found[0]
    assert all(tensor.shape != (4, 4, 32) for tensor in held), "hidden states of a step are its own"


def test_a_cache_that_grew_too_small_is_replaced_and_what_is_kept_can_be_given_back():
    model = head_model("linear", dtype=torch.float64)
    capture = CountingCapture()
    with graph_settings(capture=capture, ahead=0):
        first = run_loop(model, (9,), new=20)
        assert run_loop(model, (9,), new=60).graphs.cache.capacity == first.graphs.cache.capacity == 256
        longer = run_loop(model, (210,), new=45)
        assert longer.graphs.cache.capacity == 512
        assert longer.graphs.graphs is not first.graphs.graphs
        assert [longer.new_tokens(0)] == plain_tokens(model, (210,), new=45)
        forget(longer.graphs._lean)
        assert run_loop(model, (9,), new=20).graphs.cache.capacity == 256


def test_streamed_tokens_are_those_of_the_text():
    class Collected:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model = head_model("linear")
    ids = random_tokens(7)[None]
    streamer = Collected()
    with graph_settings(capture=call_instead):
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, executor="graph", streamer=streamer
        )
    assert streamer.tokens == [*text[0].tolist(), -1]


def test_without_a_cuda_device_the_graph_executor_says_so():
    model = tiny_model("llama")
    ids = random_tokens(7)[None]
    with pytest.raises(DecodingError, match=r"needs a CUDA device.*the model is on cpu.*executor='lean'"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, executor="graph")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"tree": 6}, "candidate trees"),
        ({"drafts": "lookup"}, "copied drafts"),
        ({"draft_vocabulary": [1, 2, 3]}, "drafts from a part of the vocabulary"),
        ({"num_draft_tokens": "auto"}, "draft lengths that follow the costs"),
        ({"do_sample": True, "sample_drafts": True}, "drawn drafts"),
        ({"acceptance": "top_k"}, "acceptance='top_k'"),
        ({"repetition_penalty": 1.3}, "the processors RepetitionPenaltyLogitsProcessor"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"stopping_criteria": [lambda ids, scores, **_: torch.zeros(1, dtype=torch.bool)]}, "other criteria"),
    ],
)
def test_what_a_graph_does_not_serve_is_refused_by_name(request_: dict[str, Any], said: str):
    model = head_model("linear")
    ids = random_tokens(7)[None]
    with graph_settings(capture=call_instead), pytest.raises(DecodingError, match=f"{said}.*pass executor='lean'"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, executor="graph", **request_)


def test_a_model_without_lean_layers_is_refused():
    ids = random_tokens(7)[None]
    with (
        graph_settings(capture=call_instead),
        pytest.raises(DecodingError, match=r"captures lean layers.*not for gpt2"),
    ):
        tiny_model("gpt2").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, executor="graph")


def test_a_token_that_cannot_be_drawn_is_an_error(monkeypatch: pytest.MonkeyPatch):
    model = head_model("linear")
    ids = random_tokens(7)[None]
    monkeypatch.setattr(TemperatureLogitsWarper, "__call__", lambda self, ids, scores: scores * torch.nan)
    with graph_settings(capture=call_instead), pytest.raises(DecodingError, match="cannot draw a token"):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=True,
            temperature=0.7,
            seed=1,
            executor="graph",
        )


def test_records_come_in_the_order_in_which_they_were_asked_for():
    record = torch.zeros(2, 3 + 3, dtype=torch.long)
    queue = RecordQueue(record, length=2)
    for token, flags in ((5, 0), (6, 3)):
        record[0] = torch.tensor([token, token + 1, 0, 2, 1, flags])
        queue.push()
    assert len(queue) == 2
    first, second = queue.pop(1)[0], queue.pop(1)[0]
    assert (first.tokens, first.accepted, first.finished, first.failed) == ([5, 6], 1, False, False)
    assert (second.tokens, second.finished, second.failed) == ([6, 7], True, True)
    queue.push()
    assert len(queue) == 1


def test_a_cuda_capture_warms_up_aside_and_leaves_the_buffers_as_they_were(monkeypatch: pytest.MonkeyPatch):
    """The calls that are made of torch.cuda, in their order: this machine may have no device to make them on."""
    calls: list[str] = []

    @contextmanager
    def noted(name: str, *_: Any, **options: Any) -> Any:
        calls.append(f"enter {name} {options.get('pool')}".removesuffix(" None"))
        yield
        calls.append(f"leave {name}")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            calls.append("wait")

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            calls.append("replay")

    for name, value in {
        "device": lambda device: noted("device"),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: noted("side"),
        "CUDAGraph": Graph,
        "graph": lambda graph, pool: noted("capture", pool=pool),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * len(calls))
    state = StepState.empty(batch=2, width=2, capacity=8, vocabulary=5, device=torch.device("cpu"))

    def step() -> None:
        calls.append("step")
        state.positions_B.add_(1)

    def keep() -> Callable[[], None]:
        kept = state.snapshot()
        return lambda: state.restore(kept)

    graphs = StepGraphs(CudaCapture(torch.device("cuda")), torch.device("cuda"))
    shape = StepShape(2, 1, 1, 128, ("greedy",))
    graphs.run(shape, step, keep)
    captured = graphs._replays[shape]
    assert isinstance(captured, CapturedStep)
    assert any(tensor is state.positions_B for tensor in captured.reads)
    warm_ups = ["step"] * WARM_UPS
    assert calls == [
        "enter device",
        "wait",
        "enter side",
        *warm_ups,
        "leave side",
        "wait",
        "enter capture",
        "step",
        "leave capture",
        "leave device",
        "replay",
    ]
    # A real capture runs nothing, so what the last step did here is all that is left.
    assert state.positions_B.tolist() == [1, 1]
    assert graphs.report.pool_bytes > 0
    calls.clear()
    graphs.run(shape, step, keep)
    assert calls == ["replay"]
    graphs.run(StepShape(2, 1, 1, 256, ("greedy",)), step, keep)
    assert "enter capture pool" in calls


def test_a_compiled_capture_captures_what_the_compiler_made_of_the_step():
    numbers = torch.zeros(4)
    captured: list[Callable[[], None]] = []

    def keep(step: Callable[[], None], prepare: Callable[[], None]) -> Callable[[Any], None]:
        captured.append(step)
        return lambda current: step()

    capture = CompiledCapture(keep, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        for amount in range(12):  # more than torch.compile compiles one function for

            def step(amount: int = amount) -> None:
                numbers.add_(amount)

            replay = capture(lambda step=step: step(), lambda: None)
            replay(step)
    assert numbers.tolist() == [66.0] * 4
    assert len(captured) == 12


def test_the_bucket_is_large_enough_for_steps_that_are_on_their_way(monkeypatch: pytest.MonkeyPatch):
    """With every draft right a row advances by a whole block per step, also in steps that nobody has looked at."""
    model = head_model("sequential", dtype=torch.float64)
    batch = ragged_batch((100, 7), "ll")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 60}
    expected = model.generate(batch.input_ids, **options)
    right_at_times(monkeypatch, expected[:, 100:].tolist(), share=1.0)
    for ahead in (0, 2):
        with graph_settings(capture=call_instead, ahead=ahead):
            assert torch.equal(model.generate(batch.input_ids, executor="graph", **options), expected)
