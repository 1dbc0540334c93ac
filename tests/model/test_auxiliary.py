"""Auxiliary objectives are their definitions, leave the tokens' own loss alone, and are saved with the heads."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import headway.decoding.engine  # noqa: F401  (registers the engine)
from head_cases import ARCHITECTURES
from headway.errors import ConfigError
from headway.heads.auxiliary import RegisterTokens
from headway.losses.objective import TrainingObjective
from headway.model.config import MultiTokenConfig
from headway.model.memory import model_footprint
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.per_head import backward_per_head
from tiny_models import VOCABULARY, random_tokens, tiny_model

D, V, T = 32, VOCABULARY, 11
TOKENS = random_tokens(3, T)
FAMILIES = ["llama-gqa-tied", "qwen3-sliding", "gemma2", "gemma3_text-capped", "gpt2", "gpt_neox"]
OBJECTIVES = ["top", "mutor"]
DOCUMENTS = torch.tensor([0] * 4 + [1] * 7)[None].expand(3, -1)
POSITIONS = torch.tensor([*range(4), *range(7)])[None].expand(3, -1)
PADDING = torch.tensor([[1] * T, [1] * 8 + [0] * 3, [0] * 3 + [1] * 8])


def auxiliary_model(objective, family="llama", *, num_future_tokens=1, dtype=torch.float64, **options):
    model = tiny_model(family, num_future_tokens=num_future_tokens, dtype=dtype, auxiliary=objective, **options)
    with torch.no_grad():
        for parameter in model.heads.auxiliary.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=dtype))
    return model.train()


def fixed_distances(monkeypatch, *distances):
    monkeypatch.setattr(RegisterTokens, "distances", lambda self, rows, farthest: torch.tensor(distances[:rows]))


def interleaved_loss(model, tokens, distances):
    """x_1 r_1 x_2 r_2 ..., one row after the other, one mask entry after the other; summed nats of the registers."""
    family, total = model.family, 0.0
    embed = model.get_input_embeddings()
    register = model.heads.auxiliary.embedding.weight[0]
    for row, distance in zip(tokens, distances, strict=True):
        states = torch.stack([s for token in embed(row) for s in (token, register)])[None]
        length = len(row)
        position, sees = [], torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        for t in range(length):
            position += [t, t + distance - 1 if t + distance < length else t]
            for query in (2 * t, 2 * t + 1):
                for s in range(t + 1):
                    sees[query, 2 * s] = True
                sees[query, query] = True

        def mask(window, sees=sees, length=length):
            if window is not None:
                place = torch.arange(2 * length) // 2
                sees = sees & (place[:, None] - place[None] < window)
            if model.config._attn_implementation == "sdpa":
                return sees[None, None]
            return torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e30)[None, None]

        window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
        masks = mask(window)
        if kinds:
            masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}
        hidden = family.decoder(inputs_embeds=states, position_ids=torch.tensor([position]), attention_mask=masks)[0]
        logits = family.soft_cap(family.lm_head(hidden[0, 1::2]))
        total = total + F.cross_entropy(logits[: length - distance], row[distance:], reduction="sum")
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_future_tokens", [1, 3])
def test_registers_between_the_tokens_have_this_loss_and_these_gradients(family, num_future_tokens, monkeypatch):
    distances = (1, 3, 4)
    fixed_distances(monkeypatch, *distances)
    model = auxiliary_model("mutor", family, num_future_tokens=num_future_tokens)
    parameters = list(model.parameters())
    registers = interleaved_loss(model, TOKENS, distances) / (3 * (T - 1))
    expected = model.eval()(TOKENS, labels=TOKENS).loss + 0.3 * registers
    wanted = torch.autograd.grad(expected, parameters)
    output = model.train()(TOKENS, labels=TOKENS)
    limit = 1e-11 if family == "gpt2" else 2e-6
    assert output.auxiliary_loss.item() == pytest.approx(registers.item(), rel=limit)
    assert output.loss.item() == pytest.approx(expected.item(), rel=limit)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for gradient, reference in zip(torch.autograd.grad(output.loss, parameters), wanted, strict=True):
        assert float((gradient - reference).abs().max()) <= limit * scale


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gemma2", "gpt2"])
def test_token_order_is_a_second_unembedding_of_the_final_hidden_state(family):
    model = auxiliary_model("top", family, num_future_tokens=2, order_window=3, auxiliary_weight=0.5)
    parameters = list(model.parameters())
    scores = model.family.decoder(TOKENS)[0] @ model.heads.auxiliary.to_scores.weight.T
    terms = []
    for row, tokens in zip(scores, TOKENS, strict=True):
        for t in range(T - 1):
            y = torch.full((V,), -torch.inf, dtype=torch.float64)
            for distance in range(min(3, T - 1 - t), 0, -1):
                y[tokens[t + distance]] = 3 - distance
            terms.append(-(torch.softmax(y, 0) * torch.log_softmax(row[t], 0)).sum())
    order = torch.stack(terms).mean()
    expected = model.eval()(TOKENS, labels=TOKENS).loss + 0.5 * order
    wanted = torch.autograd.grad(expected, parameters)
    output = model.train()(TOKENS, labels=TOKENS)
    limit = 1e-11 if family == "gpt2" else 2e-6
    assert output.auxiliary_loss.item() == pytest.approx(order.item(), rel=limit)
    assert output.loss.item() == pytest.approx(expected.item(), rel=limit)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for gradient, reference in zip(torch.autograd.grad(output.loss, parameters), wanted, strict=True):
        assert float((gradient - reference).abs().max()) <= limit * scale


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_do_not_see_registers(name):
    model = auxiliary_model("mutor", "qwen3-sliding", num_future_tokens=4, **ARCHITECTURES[name])
    with_registers = model(TOKENS, labels=TOKENS, position_ids=POSITIONS)
    plain = model.eval()(TOKENS, labels=TOKENS, position_ids=POSITIONS)
    gap = (with_registers.loss_per_offset - plain.loss_per_offset).abs()
    assert float(gap.max()) < 1e-5
    assert plain.auxiliary_loss is None


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", [{"document_ids": DOCUMENTS}, {"position_ids": POSITIONS}])
def test_packed_documents_train_as_they_do_alone(objective, options, monkeypatch):
    fixed_distances(monkeypatch, 2, 2, 2)
    model = auxiliary_model(objective)
    count = torch.tensor([3 * (T - 2)])
    together = model(TOKENS, labels=TOKENS, num_valid_targets=count, **options)
    apart = [model(part, labels=part, num_valid_targets=count) for part in (TOKENS[:, :4], TOKENS[:, 4:])]
    for name in ("loss", "auxiliary_loss"):
        assert together[name].item() == pytest.approx(sum(part[name] for part in apart).item(), rel=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_on_either_side_changes_nothing(objective, monkeypatch):
    fixed_distances(monkeypatch, 2, 2, 2)
    model = auxiliary_model(objective)
    count = torch.tensor([24])
    positions = (PADDING.cumsum(1) - 1).clamp(min=0)
    labels = TOKENS.masked_fill(PADDING == 0, -100)
    rows = [tokens[mask.bool()][None] for tokens, mask in zip(TOKENS, PADDING, strict=True)]
    together = model(
        TOKENS, labels=labels, attention_mask=PADDING, position_ids=positions, num_valid_targets=count
    ).auxiliary_loss
    apart = sum(model(row, labels=row, num_valid_targets=count).auxiliary_loss for row in rows)
    assert together.item() == pytest.approx(apart.item(), rel=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_divided_by_the_whole_steps_count_add_up(objective, monkeypatch):
    fixed_distances(monkeypatch, 3, 3, 3)
    model = auxiliary_model(objective, num_future_tokens=2)
    counts = torch.tensor([3 * (T - 1), 3 * (T - 2)])
    whole = model(TOKENS, labels=TOKENS)
    parts = [model(row[None], labels=row[None], num_valid_targets=counts) for row in TOKENS]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), rel=2e-6)
    assert sum(part.auxiliary_loss for part in parts).item() == pytest.approx(whole.auxiliary_loss.item(), rel=2e-6)


def test_distances_are_drawn_for_each_row_up_to_the_farthest():
    model = auxiliary_model("mutor", register_distance=3)
    torch.manual_seed(0)
    drawn = model.heads.auxiliary.distances(200, 3)
    assert set(drawn.tolist()) == {1, 2, 3}
    torch.manual_seed(0)
    first = model(TOKENS, labels=TOKENS).auxiliary_loss
    torch.manual_seed(0)
    assert torch.equal(model(TOKENS, labels=TOKENS).auxiliary_loss, first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_inference_the_model_is_the_plain_one(objective):
    model = auxiliary_model(objective, dtype=torch.float32).eval()
    base = model.base(TOKENS, labels=TOKENS)
    output = model(TOKENS, labels=TOKENS, return_logits=True)
    assert torch.equal(output.logits, base.logits)
    assert output.loss.item() == pytest.approx(base.loss.item(), rel=1e-6)
    assert torch.equal(
        model.generate(TOKENS[:1], max_new_tokens=5), model.base.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("num_future_tokens", [1, 3])
def test_a_saved_model_trains_on_as_before_and_its_plain_export_has_no_trace(objective, num_future_tokens, tmp_path):
    model = auxiliary_model(objective, num_future_tokens=num_future_tokens, dtype=torch.float32)
    model.save_pretrained(tmp_path / "m")
    again = MultiTokenLM.from_pretrained(tmp_path / "m").train()
    losses = []
    for one in (model, again):
        torch.manual_seed(3)
        losses.append(one(TOKENS, labels=TOKENS).loss)
    assert torch.equal(*losses)
    assert json.loads((tmp_path / "m" / "mtp" / "config.json").read_text())["multi_token"]["auxiliary"] == objective
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values())
    plain.save_pretrained(tmp_path / "plain")
    assert not [key for key in plain.state_dict() if "auxiliary" in key or "mtp" in key]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parameters_are_an_unembedding_or_one_embedding(objective):
    model, without = auxiliary_model(objective, num_future_tokens=3), tiny_model(num_future_tokens=3)
    assert model.num_parameters() - without.num_parameters() == (V * D if objective == "top" else D)
    assert model_footprint(model, dtype=torch.float32).cache == model_footprint(without, dtype=torch.float32).cache
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.heads.auxiliary.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointing_and_detached_heads_change_nothing_of_it(objective, monkeypatch):
    fixed_distances(monkeypatch, 2, 1, 4)
    model = auxiliary_model(objective, num_future_tokens=3)
    expected = model(TOKENS, labels=TOKENS).auxiliary_loss
    model.train_towards(TrainingObjective(detach_trunk="on"))
    assert model(TOKENS, labels=TOKENS).auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-12)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_registers_are_refused_by_name_where_attention_takes_no_mask_per_pair():
    model = auxiliary_model("mutor")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"register tokens.*attn_implementation='sdpa'"):
        model(TOKENS, labels=TOKENS)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ConfigError, match="ready-made"):
        model(TOKENS, labels=TOKENS, attention_mask=torch.ones(3, 1, T, T, dtype=torch.bool))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"auxiliary": "tops"}, "none, top, mutor"),
        ({"order_window": 3}, "only top"),
        ({"auxiliary": "top", "register_distance": 3}, "only mutor"),
        ({"auxiliary": "mutor", "register_distance": 0}, "whole number >= 1"),
        ({"auxiliary_weight": 0.5}, "needs an auxiliary objective"),
        ({"auxiliary": "top", "auxiliary_weight": -1.0}, "finite and >= 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        MultiTokenConfig(num_future_tokens=1, **fields)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_places_refuse_it_or_know_it(objective):
    model = auxiliary_model(objective, num_future_tokens=2)
    assert MultiTokenConfig.from_dict(model.mtp_config.to_dict()) == model.mtp_config
    with pytest.raises(ConfigError, match="head-by-head"):
        backward_per_head(model, TOKENS, TOKENS)
    if objective == "top":
        with pytest.raises(ConfigError, match="resize the base first"):
            model.resize_token_embeddings(V + 4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_of_random_weights_has_it_too(objective):
    config = tiny_model().config
    model = MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=2, auxiliary=objective))
    assert all(isinstance(part, nn.Module) for part in [model.heads.auxiliary])
    assert float(next(model.heads.auxiliary.parameters()).detach().std()) > 0
