"""What a model is trained on: weights of a pass, distilled heads, heads that the base does not feel."""

from __future__ import annotations

import pytest
import torch

from head_cases import ARCHITECTURES, CHANGES_BASE, head_model
from headway.errors import ConfigError
from headway.functional.targets import shift_targets
from headway.losses.objective import TrainingObjective
from headway.losses.reference import reference_divergence
from tiny_models import random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 14)
POSITIONS = torch.cat([torch.arange(5), torch.arange(9)])[None].expand(2, -1)
CUT = [name for name in ARCHITECTURES if name not in CHANGES_BASE]


def gradients(model, **arguments):
    model.zero_grad()
    output = model(TOKENS, labels=TOKENS, position_ids=POSITIONS, **arguments)
    output.loss.backward()
    return output, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def base_alone(model):
    """Gradients of the same base trained on the next token alone."""
    model.base.zero_grad()
    hidden = model(TOKENS, position_ids=POSITIONS, use_cache=False).logits
    targets = shift_targets(TOKENS, offset=1, position_ids_BT=POSITIONS)
    torch.nn.functional.cross_entropy(hidden.flatten(0, 1), targets.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.base.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_distilled_heads_learn_from_the_models_own_distribution_at_the_shifted_position(name):
    model = head_model(name, "gemma2" if name == "linear" else "llama", dtype=torch.float64)
    objective = TrainingObjective(divergence="reverse_kl", cross_entropy_share=0.25)
    model.train_towards(objective)
    output = model(TOKENS, labels=TOKENS, position_ids=POSITIONS, return_future_logits=True)
    logits, plain = output.future_logits, output.loss_per_offset
    expected = plain[0].item()
    for offset in range(2, 5):
        targets = shift_targets(TOKENS, offset=offset, position_ids_BT=POSITIONS)
        own = reference_divergence(
            logits[:, :, offset - 1], logits[:, :, 0], targets, offset=offset, objective=objective
        )
        mean = own.item() / int((targets != -100).sum())
        assert output.objective_per_offset[offset - 1].item() == pytest.approx(
            0.25 * plain[offset - 1].item() + 0.75 * mean, rel=1e-10
        )
        expected += output.objective_per_offset[offset - 1].item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    output.loss.backward()
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_another_model_teaches_as_if_its_logits_were_written_down(family):
    model = tiny_model(dtype=torch.float64)
    teacher = tiny_base(family, dtype=torch.float64, seed=3)
    objective = TrainingObjective(divergence="kl", distill_next_token=True)
    model.train_towards(objective, teacher=teacher)
    got = model(TOKENS, labels=TOKENS, document_ids=POSITIONS - torch.arange(14), return_future_logits=True)
    # each document by itself, so that the comparison needs no mask
    teacher_logits = torch.cat([teacher(part).logits for part in (TOKENS[:, :5], TOKENS[:, 5:])], dim=1)
    for offset in range(1, 5):
        targets = shift_targets(TOKENS, offset=offset, position_ids_BT=POSITIONS)
        own = reference_divergence(
            got.future_logits[:, :, offset - 1], teacher_logits, targets, offset=offset, objective=objective
        )
        mean = own.item() / int((targets != -100).sum())
        assert got.objective_per_offset[offset - 1].item() == pytest.approx(mean, rel=1e-10)
    got.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in model.named_modules())
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_weights_of_a_pass_override_the_configuration_and_unweighted_heads_do_not_run():
    model = tiny_model(offset_weights=(1.0, 1.0, 1.0, 1.0)).train()
    ran = []
    for index, head in enumerate(model.heads):
        head.register_forward_hook(lambda *_, offset=index + 2: ran.append(offset))
    full, _ = gradients(model)
    assert ran == [2, 3, 4]
    ran.clear()
    output, found = gradients(model, offset_weights=(1.0, 0.5, 0.0, 0.0))
    assert ran == [2]
    assert output.loss.item() == pytest.approx((full.loss_per_offset[0] + 0.5 * full.loss_per_offset[1]).item())
    assert output.loss_per_offset.isnan().tolist() == [False, False, True, True]
    assert all(found[name] is None for name in found if name.startswith(("heads.1.", "heads.2.")))
    assert all(found[name] is not None for name in found if name.startswith("heads.0."))
    assert (
        len(model(TOKENS, labels=TOKENS, offset_weights=(1, 0, 0, 0), return_future_logits=True).future_logits[0, 0])
        == 4
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_offset_1_alone_trains_the_base_as_the_plain_model_would(name):
    model = head_model(name, dtype=torch.float64).train()
    _, found = gradients(model, offset_weights=(1.0, 0.0, 0.0, 0.0))
    expected = base_alone(model)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[f"base.{parameter}"], gradient, rtol=1e-10, atol=1e-13)
    if name not in CHANGES_BASE:
        assert all(found[f"heads.{parameter}"] is None for parameter, _ in model.heads.named_parameters())


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "gpt2"])
@pytest.mark.parametrize("name", CUT)
def test_with_a_detached_trunk_the_base_learns_as_if_there_were_no_heads(name, family):
    model = head_model(name, family, dtype=torch.float64).train()
    _, felt = gradients(model)
    model.train_towards(TrainingObjective(detach_trunk="on"))
    _, found = gradients(model)
    expected = base_alone(model)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[f"base.{parameter}"], gradient, rtol=1e-10, atol=1e-13)
    for parameter, _ in model.heads.named_parameters():  # the heads' own gradients are what they were
        torch.testing.assert_close(found[f"heads.{parameter}"], felt[f"heads.{parameter}"], rtol=1e-10, atol=1e-13)


def test_detached_hidden_states_leave_the_shared_norm_and_unembedding_to_the_heads():
    model = tiny_model(dtype=torch.float64).train()
    expected = base_alone(model)
    model.train_towards(TrainingObjective(detach_trunk="hidden-states"))
    _, found = gradients(model)
    shared = {"model.norm.weight", "lm_head.weight"}
    for parameter, gradient in expected.items():
        gap = float((found[f"base.{parameter}"] - gradient).abs().max())
        assert (gap > 1e-3) if parameter in shared else (gap < 1e-13), parameter


def test_later_tokens_are_scored_by_the_next_tokens_logits_of_a_model_without_heads():
    model = tiny_model(num_future_tokens=1, dtype=torch.float64).train()
    output, found = gradients(model, offset_weights=(1.0, 0.5, 0.25))
    model.zero_grad()
    logits = model(TOKENS, position_ids=POSITIONS, use_cache=False).logits
    losses = [
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), shift_targets(TOKENS, offset=offset, position_ids_BT=POSITIONS).flatten()
        )
        for offset in (1, 2, 3)
    ]
    total = losses[0] + 0.5 * losses[1] + 0.25 * losses[2]
    total.backward()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert output.loss_per_offset.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("objective", "teacher", "words"),
    [
        (TrainingObjective(divergence="kl", distill_next_token=True), None, "cannot teach itself"),
        (TrainingObjective(), "llama", "choose one, such as kl"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_with_the_way_out(objective, teacher, words):
    with pytest.raises(ConfigError, match=words):
        tiny_model().train_towards(objective, teacher=None if teacher is None else tiny_base(teacher))


def test_what_cannot_be_cut_off_or_shared_is_refused():
    with pytest.raises(ConfigError, match="wiring='parallel'"):
        head_model("anticausal").train_towards(TrainingObjective(detach_trunk="on"))
    with pytest.raises(ConfigError, match="same tokenizer"):
        tiny_model().train_towards(TrainingObjective(divergence="kl"), teacher=tiny_base("llama", vocab_size=41))
    with pytest.raises(ConfigError, match="hf first"):
        tiny_model().train_towards(TrainingObjective(divergence="kl"), teacher=head_model("anticausal"))
    with pytest.raises(ConfigError, match="pass 4 numbers"):
        tiny_model()(TOKENS, labels=TOKENS, offset_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="give one offset a weight"):
        tiny_model()(TOKENS, labels=TOKENS, offset_weights=(0.0, 0.0, 0.0, 0.0))
