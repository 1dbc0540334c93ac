"""Training on drafts: every position is trained in the state in which decoding would have found it."""

from __future__ import annotations

import pytest
import torch

from head_cases import ARCHITECTURES, IN_TURN, head_model
from headway.decoding.engine import ENGINE, decoding_context
from headway.errors import ConfigError
from headway.heads import lanes
from headway.losses.objective import TrainingObjective
from headway.model.per_head import backward_per_head
from tiny_models import random_tokens

TOKENS = random_tokens(2, 8)
ON_DRAFTS = TrainingObjective(train_on_drafts=True)
FAMILIES = ["llama", "gemma3_text-capped", "qwen3-sliding", "gpt2", "gpt_neox"]
NAMES = sorted(IN_TURN)


def naive_loss(model, tokens):
    """Draft from every position of every row with a whole teacher-forced forward per drafted token."""
    count = model.num_future_tokens
    sums = [[] for _ in range(count)]
    for row in tokens:
        for start in range(len(row) - 1):
            text = row[: start + 2].tolist()
            logits = model(torch.tensor([text]), return_future_logits=True).future_logits[0, start]
            sums[0].append(-torch.log_softmax(logits[0], 0)[row[start + 1]])
            for offset in range(2, count + 1):
                logits = model(torch.tensor([text]), return_future_logits=True).future_logits[0, start, offset - 1]
                if start + offset < len(row):
                    sums[offset - 1].append(-torch.log_softmax(logits, 0)[row[start + offset]])
                text.append(int(logits.argmax()))
    return sum(torch.stack(values).mean() for values in sums)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sequential", "sequential-fused-shared", "hydra"])
def test_loss_and_gradients_are_those_of_drafting_from_every_position(name, family):
    model = head_model(name, family, dtype=torch.float64)
    limit = 1e-11 if family == "gpt2" else 5e-6
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = naive_loss(model, TOKENS)
    wanted = torch.autograd.grad(expected, parameters)
    model.train_towards(ON_DRAFTS)
    loss = model(TOKENS, labels=TOKENS).loss
    assert loss.item() == pytest.approx(expected.item(), rel=limit)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for gradient, reference in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert float((gradient - reference).abs().max()) <= limit * scale
    model.train_towards(TrainingObjective())
    assert model(TOKENS, labels=TOKENS).loss.item() != pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_at_a_position_are_those_of_the_decoder_there(name, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    chosen = {}

    def choose(hidden_BTD, offset):
        chosen[offset] = model.offset_logits(hidden_BTD, offset=offset).argmax(dim=-1)
        return chosen[offset]

    monkeypatch.setattr("headway.model.trunk_and_heads.likeliest", lambda model, hidden, offset: choose(hidden, offset))
    with torch.no_grad():
        states = model.offset_hidden_states(TOKENS, on_drafts=True, use_cache=False)
    last = model.offset_logits(states.hidden[-1], offset=4, previous=TOKENS).argmax(dim=-1)
    for start in (0, 3, 6):
        prompt = TOKENS[:, : start + 1]
        loop = ENGINE.start(model, prompt, max_new_tokens=6, num_draft_tokens=3)
        with decoding_context(model):
            prefill = loop.executor.prefill(num_offsets=1)
            drafted = loop.executor.draft(prefill, [0, 0], last_B=TOKENS[:, start + 1], count=3)
        found = torch.stack([chosen[2][:, start], chosen[3][:, start], last[:, start]], dim=1)
        assert torch.equal(found, drafted)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_and_padding_train_as_they_do_alone(name):
    model = head_model(name, dtype=torch.float64)
    model.train_towards(ON_DRAFTS)
    first, second = random_tokens(1, 6, seed=3), random_tokens(1, 7, seed=4)
    counts = torch.tensor([11, 9, 7, 5])
    apart = sum(model(row, labels=row, num_valid_targets=counts).loss for row in (first, second))
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = torch.cat([first, second], dim=1)
    together = model(packed, labels=packed, position_ids=positions, num_valid_targets=counts).loss
    assert together.item() == pytest.approx(apart.item(), rel=2e-6)
    padded = torch.cat([first, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    alone = model(first, labels=first).loss
    assert model(padded, labels=padded, attention_mask=mask).loss.item() == pytest.approx(alone.item(), rel=2e-6)


@pytest.mark.parametrize("name", ["sequential-shared", "hydra"])
def test_eager_attention_and_checkpointing_change_no_gradient(name):
    found = []
    for implementation, checkpointing in (("sdpa", False), ("eager", False), ("sdpa", True)):
        model = head_model(name, dtype=torch.float64).train()
        model.base.set_attn_implementation(implementation)
        model.train_towards(ON_DRAFTS)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[1:]:
        # The eager softmax of these families is float32.
        assert float((other - found[0]).abs().max()) <= 1e-5 * float(found[0].abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_lane_too_far_would_be_noticed(family, monkeypatch):
    model = head_model("sequential", family, dtype=torch.float64)
    model.train_towards(ON_DRAFTS)
    right = model(TOKENS, labels=TOKENS).loss.item()
    original = lanes.Lanes._mask

    def wrong(self, order):
        mask = original(self, order).clone()
        length = mask.shape[-1] // (len(order) + 1)
        # The newest lane may look at one teacher-forced state more, which decoding has overwritten by then.
        mask[..., -length:, :length].diagonal(offset=-(len(order) - 1), dim1=-2, dim2=-1).fill_(
            True if mask.dtype == torch.bool else 0.0
        )
        return mask

    monkeypatch.setattr(lanes.Lanes, "_mask", wrong)
    assert model(TOKENS, labels=TOKENS).loss.item() != pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - IN_TURN))
def test_heads_that_read_no_drafts_refuse_to_be_trained_on_them(name):
    with pytest.raises(ConfigError, match="sequential, hydra"):
        head_model(name).train_towards(ON_DRAFTS)


def test_the_head_by_head_schedule_refuses_drafts():
    model = head_model("hydra")
    model.train_towards(ON_DRAFTS)
    with pytest.raises(ConfigError, match="train_on_drafts"):
        backward_per_head(model, TOKENS, TOKENS)
