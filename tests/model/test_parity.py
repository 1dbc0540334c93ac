"""n = 1 is the plain model, and offset 1 of any n too, in every family."""

from __future__ import annotations

import pytest
import torch

from headway.losses.reference import reference_loss
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model

PLAIN = MultiTokenConfig(num_future_tokens=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal_to_the_base_for_n_1_and_4(family):
    tokens = random_tokens(2, 20)
    base = tiny_base(family)
    expected = base(tokens).logits
    for num_future_tokens in (1, 4):
        model = attach_heads(base, MultiTokenConfig(num_future_tokens=num_future_tokens))
        assert model.base is base
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model(tokens, return_future_logits=True).future_logits[:, :, 0], expected)
        assert torch.equal(base(tokens).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_a_copy_of_the_last_layer_gives_the_bases_logits(family):
    model = attach_heads(tiny_base(family), MultiTokenConfig(num_future_tokens=3))
    logits = model(random_tokens(2, 20), return_future_logits=True, use_cache=False).future_logits
    for offset in (2, 3):
        assert float((logits[:, :, offset - 1] - logits[:, :, 0]).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_with_n_1_loss_and_gradients_equal_the_familys_own(family, padded):
    tokens = random_tokens(3, 15)
    labels = tokens.clone()
    labels[1, 3] = -100
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, 10:] = 0
        labels[0, 10:] = -100
    base = tiny_base(family)
    base(tokens, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in base.named_parameters()}
    value = base(tokens, attention_mask=mask, labels=labels).loss.item()
    base.zero_grad()
    loss = attach_heads(base, PLAIN)(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    for name, parameter in base.named_parameters():
        scale = float(expected[name].abs().max().clamp(min=1e-3))
        assert float((parameter.grad - expected[name]).abs().max()) <= 2e-6 * scale, name


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "gemma2", "gpt2"])
@pytest.mark.parametrize("num_future_tokens", [1, 4])
def test_in_float64_the_loss_is_the_plain_definition(family, num_future_tokens):
    tokens = random_tokens(2, 12)
    model = tiny_model(family, num_future_tokens=num_future_tokens, dtype=torch.float64)
    states = model.offset_hidden_states(tokens, use_cache=False)
    hidden = [states.last_hidden_BTD, *map(model.final_norm, states.future_hidden)]
    expected = reference_loss(hidden, model.family.lm_head.weight, tokens, logits_transform=model.family.soft_cap)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, parameters)
    loss = model(tokens, labels=tokens).loss
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    # Norms of these families compute in float32 (1e-6), GPT-2's in float64 (1e-12).
    limit = 1e-12 if family == "gpt2" else 1e-6
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for gradient, reference in zip(torch.autograd.grad(loss, parameters), expected_gradients, strict=True):
        assert float((gradient - reference).abs().max()) <= limit * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_gets_a_gradient_in_every_parameter(family):
    model = tiny_model(family)
    tokens = random_tokens(2, 20)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key bias shifts all scores of a query alike; its gradient is rounding.
        if not name.endswith(("k_proj.bias", "attention.query_key_value.bias")):
            assert float(parameter.grad.abs().max()) > 0, name


def test_outputs_follow_the_contract_of_what_is_returned_when():
    model, tokens = tiny_model(), random_tokens(2, 9)
    with_labels = model(tokens, labels=tokens)
    assert with_labels.logits is None
    assert with_labels.future_logits is None
    assert with_labels[0] is with_labels.loss
    assert with_labels.loss_per_offset.shape == (4,)
    assert model(tokens, labels=tokens, return_logits=True).logits.shape == (2, 9, 40)
    everything = model(tokens, labels=tokens, return_future_logits=True)
    assert everything.future_logits.shape == (2, 9, 4, 40)
    assert torch.equal(everything.logits, everything.future_logits[:, :, 0])
    assert model(tokens, return_future_logits=True, logits_to_keep=2).future_logits.shape == (2, 2, 4, 40)
    assert model(tokens, labels=tokens, return_dict=False)[0].item() == with_labels.loss.item()


def test_future_logits_of_a_cached_continuation_equal_those_without_a_cache():
    from transformers import DynamicCache

    for family in ("llama", "gemma3_text", "gpt2", "phi3"):
        model, tokens = tiny_model(family, dtype=torch.float64), random_tokens(2, 14)
        cache = DynamicCache()
        model(tokens[:, :9], past_key_values=cache, use_cache=True, return_future_logits=True)
        continued = model(
            tokens[:, 9:],
            past_key_values=cache,
            use_cache=True,
            return_future_logits=True,
            position_ids=torch.arange(9, 14)[None].expand(2, -1),
        ).future_logits
        whole = model(tokens, return_future_logits=True, use_cache=False).future_logits
        assert float((continued - whole[:, 9:]).abs().max()) < 1e-5, family


def test_weights_scale_each_offsets_share_of_the_loss():
    tokens = random_tokens(2, 12)
    per_offset = tiny_model()(tokens, labels=tokens).loss_per_offset
    weighted = tiny_model(offset_weights=(1.0, 0.5, 0.0, 2.0))(tokens, labels=tokens)
    expected = per_offset[0] + 0.5 * per_offset[1] + 2.0 * per_offset[3]
    assert weighted.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(weighted.loss_per_offset[[0, 1, 3]], per_offset[[0, 1, 3]])
    assert weighted.loss_per_offset.isnan().tolist() == [False, False, True, False]  # weight 0 is not computed


def test_the_trainers_single_count_divides_every_offset():
    tokens = random_tokens(2, 12)
    model = tiny_model()
    plain = model(tokens, labels=tokens)
    counts = torch.tensor([22, 20, 18, 16])
    shared = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(11))
    assert shared.loss.item() == pytest.approx(float((plain.loss_per_offset * counts / 11).sum()), rel=1e-6)
    given = model(tokens, labels=tokens, num_valid_targets=2 * counts)
    assert given.loss.item() == pytest.approx(plain.loss.item() / 2, rel=1e-6)
