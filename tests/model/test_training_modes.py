"""Autocast, gradient checkpointing, compiled layers and the per-head schedule give the same gradients."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from headway.model.multi_token_lm import MultiTokenLM
from headway.model.per_head import backward_per_head
from tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 16)
POSITIONS = torch.cat([torch.arange(6), torch.arange(10)])[None].expand(2, -1)


def gradients(model: MultiTokenLM, **context) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, position_ids=POSITIONS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    scale = max(float(g.abs().max()) for g in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in second) / scale


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "gemma2", "gpt2", "gpt_neox"])
def test_the_papers_per_head_schedule_has_the_same_gradients(family):
    model = tiny_model(family, dtype=torch.float64, offset_weights=(1.0, 0.5, 0.25, 2.0)).train()
    value, expected = gradients(model)
    model.zero_grad()
    got = backward_per_head(model, TOKENS, TOKENS, position_ids_BT=POSITIONS)
    assert got.item() == pytest.approx(value, rel=1e-12)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert largest_gap(found, expected) <= (1e-12 if family == "gpt2" else 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model = tiny_model(family).train()
    value, expected = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.base.enable_input_require_grads()
    got, found = gradients(model)
    assert got == pytest.approx(value, rel=1e-6)
    assert largest_gap(found, expected) < 1e-6
    assert all(head.gradient_checkpointing for head in model.heads)


def test_bfloat16_autocast_is_as_close_as_bfloat16_allows():
    model = tiny_model().train()
    value, expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, found = gradients(model)
    assert got == pytest.approx(value, rel=2e-2)
    cosine = torch.nn.functional.cosine_similarity(
        torch.cat([g.flatten() for g in found.values()]), torch.cat([g.flatten() for g in expected.values()]), dim=0
    )
    assert float(cosine) > 0.999
    assert all(g.dtype == torch.float32 for g in found.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_change_no_gradient():
    model = tiny_model().train()
    _, expected = gradients(model)
    compiled = copy.deepcopy(model)
    for layer in [*compiled.family.layers, *compiled.heads]:
        layer.forward = torch.compile(layer.forward)
    _, found = gradients(compiled)
    assert largest_gap(found, expected) < 1e-5


def test_a_deep_copy_is_independent_and_keeps_its_own_tap():
    model = tiny_model()
    twin = copy.deepcopy(model)
    expected = model(TOKENS, return_future_logits=True).future_logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(TOKENS, return_future_logits=True).future_logits, expected)
