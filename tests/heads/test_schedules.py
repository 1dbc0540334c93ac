"""The paper's head-by-head schedules have the same gradients; precision and checkpointing change nothing else."""

from __future__ import annotations

import pytest
import torch

from head_cases import ARCHITECTURES, head_model
from headway.losses import chunked
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.per_head import backward_per_head
from tiny_models import random_tokens

TOKENS = random_tokens(2, 16)
POSITIONS = torch.cat([torch.arange(6), torch.arange(10)])[None].expand(2, -1)


def gradients(model):
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, position_ids=POSITIONS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_gap(found, expected):
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_by_head_backward_has_the_same_gradients(name, family):
    model = head_model(name, family, dtype=torch.float64).train()
    weights = {"offset_weights": (1.0, 0.5, 0.25, 2.0)}
    model.mtp_config = type(model.mtp_config).from_dict(model.mtp_config.to_dict() | weights)
    value, expected = gradients(model)
    model.zero_grad()
    got = backward_per_head(model, TOKENS, TOKENS, position_ids_BT=POSITIONS)
    assert got.item() == pytest.approx(value, rel=1e-12)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert largest_gap(found, expected) <= (1e-12 if family == "gpt2" else 1e-6)


@pytest.mark.parametrize("name", ["transformer", "causal", "anticausal", "sequential", "medusa"])
def test_offsets_without_a_weight_add_nothing_head_by_head(name):
    model = head_model(name, dtype=torch.float64).train()
    weights = {"offset_weights": (1.0, 0.0, 0.25, 0.0)}
    model.mtp_config = type(model.mtp_config).from_dict(model.mtp_config.to_dict() | weights)
    model(TOKENS, labels=TOKENS, position_ids=POSITIONS).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    backward_per_head(model, TOKENS, TOKENS, position_ids_BT=POSITIONS)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert found.keys() == {name for name, gradient in expected.items() if bool(gradient.any())}
    assert largest_gap(found, {name: expected[name] for name in found}) <= 1e-6


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("transformer", [1, 2, 3, 4]),
        ("medusa", [1, 2, 3, 4]),
        ("causal", [4, 3, 2, 1]),
        ("sequential", [4, 3, 2, 1]),
        ("anticausal", [1, 2, 3, 4]),
    ],
)
def test_losses_of_a_chain_are_visited_from_the_head_farthest_from_the_trunk(name, order, monkeypatch):
    seen = []
    original = MultiTokenLM.before_unembedding

    def recording(self, hidden, *, offset):
        seen.append(offset)
        return original(self, hidden, offset=offset)

    monkeypatch.setattr(MultiTokenLM, "before_unembedding", recording)
    backward_per_head(head_model(name), TOKENS, TOKENS)
    assert seen == order


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(name, family):
    model = head_model(name, family).train()
    value, expected = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    got, found = gradients(model)
    assert got == pytest.approx(value, rel=1e-6)
    assert largest_gap(found, expected) < 2e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_autocast_is_as_close_as_bfloat16_allows(name):
    model = head_model(name, perturb=0.05).train()
    value, expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, found = gradients(model)
    assert got == pytest.approx(value, rel=2e-2)
    one, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (found, expected))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_chunk_of_one_offsets_logits_and_one_buffer_per_unembedding_are_alive(name, monkeypatch):
    chunks, buffers = [], set()
    original = chunked._chunk

    def record(targets_CK, **kwargs):
        chunks.append(targets_CK.shape[0])
        buffers.update(grad.data_ptr() for grad in kwargs["grad_weights"])
        return original(targets_CK, **kwargs)

    monkeypatch.setattr(chunked, "_chunk", record)
    model = head_model(name, num_future_tokens=6)
    model.mtp_config = type(model.mtp_config).from_dict(model.mtp_config.to_dict() | {"loss_chunk_tokens": 5})
    model(TOKENS, labels=TOKENS).loss.backward()
    assert max(chunks) == 5
    own = 0 if model.heads.unembeddings is None else len(model.heads.unembeddings)
    assert len(buffers) == 1 + own + (model.heads.markov is not None)
