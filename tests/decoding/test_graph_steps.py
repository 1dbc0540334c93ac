"""A static step gives what the step-by-step executor gives, and could be captured: no waits, no moving buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding_cases import base_continuation, new_tokens, ragged_batch
from graph_cases import NEW, NoHostWait, graph_executor_on, right_at_times
from head_cases import head_model
from headway.decoding.choosing import GreedyChooser
from headway.decoding.graphs.capture import call_instead, graph_settings
from headway.decoding.graphs.emission import SampledChoice, draw, emit_chain
from headway.functional.sampling import inverse_cdf
from tiny_models import random_tokens, tiny_model

HEADS = [
    "transformer-2-layers",
    "transformer-markov",
    "causal",
    "anticausal-markov",
    "linear-tap-markov",
    "replicated",
    "medusa",
    "hydra",
    "sequential",
    "sequential-fused-shared",
]


def generated(model: Any, batch: Any, executor: str, *, ahead: int = 0, new: int = NEW, **options: Any) -> Any:
    """A generation; steps of the graph executor run un-captured."""
    with graph_settings(capture=call_instead, ahead=ahead):
        return model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new,
            executor=executor,
            return_dict_in_generate=True,
            pad_token_id=0,
            **options,
        )


def continuations(model: Any, batch: Any, new: int = NEW) -> list[list[int]]:
    """The base's own."""
    return [base_continuation(model, row, new) for row in batch.rows()]


@pytest.mark.parametrize("architecture", HEADS)
def test_tokens_statistics_and_drafts_are_those_of_the_eager_executor(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    model = head_model(architecture, dtype=torch.float64)
    batch = ragged_batch((9, 1, 12), "lrl")
    if architecture.startswith("anticausal"):  # its heads are part of what the base alone does not know
        truth = new_tokens(generated(model, batch, "eager", num_draft_tokens=0), batch.input_ids.shape[1])
    else:
        truth = continuations(model, batch)
    said = right_at_times(monkeypatch, truth)
    eager = generated(model, batch, "eager")
    eager_said, said[:] = list(said), []
    graph = generated(model, batch, "graph")
    assert graph.sequences.tolist() == eager.sequences.tolist()
    assert new_tokens(graph, batch.input_ids.shape[1]) == truth
    assert graph.acceptance.lengths == eager.acceptance.lengths
    assert max(map(max, graph.acceptance.lengths)) > 2
    assert (graph.acceptance.drafted, graph.acceptance.accepted) == (
        eager.acceptance.drafted,
        eager.acceptance.accepted,
    )
    for step, (own, reference) in enumerate(zip(said, eager_said, strict=False)):
        live = [row for row, lengths in enumerate(eager.acceptance.lengths) if len(lengths) > step]
        assert own[live, : reference.shape[1]].tolist() == reference[live].tolist(), f"after forward {step}"


@pytest.mark.parametrize("family", ["llama-gqa-tied", "mistral-sliding", "qwen2", "qwen3-sliding", "olmo2", "phi3"])
def test_every_lean_family_runs(family: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(family, dtype=torch.float64)
    batch = ragged_batch((9, 5), "lr")
    truth = continuations(model, batch)
    right_at_times(monkeypatch, truth)
    assert new_tokens(generated(model, batch, "graph", ahead=1), batch.input_ids.shape[1]) == truth


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("drafts", [0, 2])
def test_end_tokens_limits_and_steps_asked_for_in_advance_change_nothing(
    ahead: int, drafts: int, monkeypatch: pytest.MonkeyPatch
):
    model = head_model("transformer", dtype=torch.float64)
    batch = ragged_batch((9, 5, 12), "rll")
    truth = continuations(model, batch)
    ends = [truth[0][4], truth[1][9]]
    right_at_times(monkeypatch, truth)
    options = {"eos_token_id": ends, "num_draft_tokens": drafts}
    eager = generated(model, batch, "eager", **options)
    right_at_times(monkeypatch, truth)
    graph = generated(model, batch, "graph", ahead=ahead, **options)
    assert graph.sequences.tolist() == eager.sequences.tolist()
    assert graph.num_new_tokens.tolist() == eager.num_new_tokens.tolist() != [NEW] * 3
    assert graph.acceptance.lengths == eager.acceptance.lengths
    assert graph.mode == eager.mode
    assert generated(model, batch, "graph", ahead=ahead, new=1, **options).num_new_tokens.tolist() == [1] * 3


def test_drawn_tokens_are_those_of_the_seed(monkeypatch: pytest.MonkeyPatch):
    model = head_model("linear", dtype=torch.float64)
    batch = ragged_batch((9, 5, 12), "lrl")
    for request in (
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "seed": 5},
        {"min_p": 0.02, "top_k": 0, "seed": [7, 8, 9]},
    ):
        options = {"do_sample": True, **request}
        plain = generated(model, batch, "eager", num_draft_tokens=0, **options)
        truth = new_tokens(plain, batch.input_ids.shape[1])
        with monkeypatch.context() as patch:
            right_at_times(patch, truth)
            graph = generated(model, batch, "graph", ahead=1, **options)
        assert new_tokens(graph, batch.input_ids.shape[1]) == truth
        assert graph.acceptance.mean_acceptance_length > 1.5


@pytest.mark.parametrize("architecture", ["transformer-markov", "hydra", "sequential"])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_step_makes_nobody_wait_and_its_buffers_stay_where_they_are(architecture: str, drawn: bool):
    model = head_model(architecture, dtype=torch.float64)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]
    run = graph_executor_on(model, choice=SampledChoice(warpers) if drawn else None)
    with torch.inference_mode():
        run.begin()
        layers = [tensor for layer in run.cache.layers for tensor in (layer.keys, layer.values)]
        before = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in [*run.state.tensors(), *layers]]
        for _ in range(3):
            with NoHostWait() as watch:
                run.static_step(verified=3, drafted=3, slots=64)
            assert watch.seen > 50
    layers = [tensor for layer in run.cache.layers for tensor in (layer.keys, layer.values)]
    after = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in [*run.state.tensors(), *layers]]
    assert after == before


def test_the_watch_notices_what_a_graph_cannot_hold():
    x = torch.arange(4)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.tolist() and x[0].item(),
        lambda: x[x > 1],
        lambda: torch.tensor([1, 2]),
        lambda: x.to("meta"),
    ):
        with pytest.raises(AssertionError), NoHostWait():
            wait()


@pytest.mark.parametrize("architecture", ["transformer", "linear-tap-markov", "hydra", "sequential"])
def test_a_step_runs_on_a_device_that_has_no_values(architecture: str):
    """Nothing in it can depend on a value, and everything it makes is made on the model's device."""
    model = head_model(architecture).to("meta")
    run = graph_executor_on(model)
    with torch.inference_mode():
        run.state.begin(
            lengths=run._prompts.lengths, rooms=[5] * 4, ends=frozenset({3}), uniforms=None, ids_BP=run._prompts.ids_BP
        )
        for _ in range(2):
            run.static_step(verified=3, drafted=3, slots=64)
    assert run.state.record_BR.device.type == "meta"


def test_a_step_can_be_traced_into_one_graph_that_gives_the_same():
    model = head_model("transformer", dtype=torch.float64)
    run = graph_executor_on(model, lengths=(9,))

    def step(*buffers: torch.Tensor) -> torch.Tensor:
        run.static_step(verified=3, drafted=3, slots=64)
        return run.state.record_BR.clone()

    with torch.inference_mode():
        run.begin()
        kept = run.state.snapshot()
        traced = make_fx(step)()
        expected = run.state.snapshot()
        run.state.restore(kept)
        assert torch.equal(traced(), expected[-1])
    assert all(torch.equal(one, other) for one, other in zip(run.state.snapshot(), expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_emission_on_the_device_is_the_greedy_chooser(data: st.DataObject):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    tokens = st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=rows, max_size=rows)
    target, block = torch.tensor(data.draw(tokens)), torch.tensor(data.draw(tokens))
    rooms = data.draw(st.lists(st.integers(0, 6), min_size=rows, max_size=rows))
    ends = data.draw(st.frozensets(st.integers(0, 3), max_size=2))
    logits = torch.nn.functional.one_hot(target, 4).float()
    ends_V = torch.tensor([token in ends for token in range(4)])
    found = emit_chain(block, target, rooms_B=torch.tensor(rooms), ends_V=ends_V)
    for row, emission in enumerate(GreedyChooser(ends).choose(logits, block, rooms)):
        if emission is None:
            assert int(found.counts_B[row]) == 0
            continue
        count = int(found.counts_B[row])
        assert target[row, :count].tolist() == emission.tokens
        assert min(int(found.accepted_B[row]), count) == emission.accepted
        assert bool(found.finished_B[row]) == emission.finished


def test_drawing_many_is_drawing_each():
    torch.manual_seed(0)
    weights = torch.rand(200, 7, dtype=torch.float64) * (torch.rand(200, 7) > 0.4)
    weights[:, 3] += 0.01
    uniforms = torch.rand(200, dtype=torch.float64)
    uniforms[:4] = torch.tensor([0.0, 1 - 2**-53, 0.5, 1 - 2**-53])
    tokens, failed = draw(weights.cumsum(dim=-1), uniforms)
    assert not failed.any()
    assert tokens.tolist() == [inverse_cdf(row, float(number)) for row, number in zip(weights, uniforms, strict=True)]


def test_one_reading_of_the_unembedding_serves_verification_and_draft():
    model = tiny_model("llama")
    assert graph_executor_on(model)._at_once
    ids = random_tokens(7)[None]
    with graph_settings(capture=call_instead):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, executor="graph")
    assert torch.equal(found, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9))
