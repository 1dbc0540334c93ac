"""Distilled heads: every divergence is its definition, value and gradients, one chunk of logits at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError
from headway.functional.logits import SoftCap
from headway.losses import chunked, distillation
from headway.losses.chunked import Distillation, LowRankBias, chunked_loss
from headway.losses.distillation import Teacher
from headway.losses.objective import TrainingObjective
from headway.losses.reference import reference_divergence, reference_loss

B, T, D, V, R = 3, 7, 8, 11, 2
DIVERGENCES = ["kl", "reverse_kl", "total_variation", "log_acceptance", "hybrid"]


def inputs(num_offsets: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(B, T, D, generator=draw, dtype=dtype).requires_grad_() for _ in range(num_offsets)]
    weight = torch.randn(V, D, generator=draw, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (B, T), generator=draw)


def own_teacher(hidden, weight, cap: float | None = None) -> Teacher:
    return Teacher(hidden[0], weight, SoftCap(cap))


def largest_gap(found, expected) -> float:
    return max(
        float((f - e).abs().max()) / max(1.0, float(e.abs().max())) for f, e in zip(found, expected, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    divergence=st.sampled_from(DIVERGENCES),
    num_offsets=st.integers(1, 9),  # also more offsets than positions
    chunk_tokens=st.integers(1, 25),
    ignored=st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, T - 1)), max_size=12),
    restart=st.integers(1, T),
    padded=st.integers(0, T),
    cap=st.sampled_from([None, 1.5]),
    share=st.sampled_from([0.0, 0.3]),
    temperature=st.sampled_from([1.0, 0.7]),
    weights=st.booleans(),
    seed=st.integers(0, 100),
)
def test_value_and_gradients_equal_the_definition_to_1e_12(
    divergence, num_offsets, chunk_tokens, ignored, restart, padded, cap, share, temperature, weights, seed
):
    hidden, weight, labels = inputs(num_offsets, seed=seed)
    for row, position in ignored:
        labels[row, position] = -100
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :padded] = 0
    objective = TrainingObjective(divergence=divergence, cross_entropy_share=share, temperature=temperature)
    common = {
        "position_ids_BT": torch.cat([torch.arange(restart), torch.arange(T - restart)])[None].expand(B, T),
        "attention_mask_BT": mask,
        "offset_weights": [0.5 + k for k in range(num_offsets)] if weights else None,
    }
    expected = reference_loss(hidden, weight, labels, logits_transform=SoftCap(cap), objective=objective, **common)
    expected_gradients = torch.autograd.grad(3 * expected, [*hidden, weight], materialize_grads=True)
    got = chunked_loss(
        hidden,
        weight,
        labels,
        soft_cap=SoftCap(cap),
        chunk_tokens=chunk_tokens,
        distillation=Distillation(objective, own_teacher(hidden, weight, cap)),
        **common,
    )
    gradients = torch.autograd.grad(3 * got.total, [*hidden, weight])
    assert abs(got.total.item() - expected.item()) <= 1e-12 * max(1.0, abs(expected.item()))
    assert largest_gap(gradients, expected_gradients) <= 1e-12
    plain = chunked_loss(hidden, weight, labels, soft_cap=SoftCap(cap), **common)
    assert torch.allclose(got.per_offset_N, plain.per_offset_N, rtol=1e-12)  # nats stay nats
    assert got.num_correct_N.tolist() == plain.num_correct_N.tolist()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_another_teacher_of_another_width_teaches_every_offset_and_feels_nothing(divergence):
    hidden, weight, labels = inputs(3)
    draw = torch.Generator().manual_seed(5)
    teacher_hidden = torch.randn(B, T, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher_weight = torch.randn(V, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    objective = TrainingObjective(divergence=divergence, distill_next_token=True)
    expected = reference_loss(
        hidden, weight, labels, objective=objective, teacher_logits_BTV=teacher_hidden @ teacher_weight.T
    )
    teacher = Teacher(teacher_hidden, teacher_weight, SoftCap())
    loss = chunked_loss(
        hidden, weight, labels, chunk_tokens=4, distillation=Distillation(objective, teacher, first_offset=1)
    )
    found = torch.autograd.grad(loss.total, [*hidden, weight, teacher_hidden, teacher_weight], allow_unused=True)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert largest_gap(found[:4], torch.autograd.grad(expected, [*hidden, weight])) <= 1e-12
    assert found[4:] == (None, None)


def test_markov_biases_and_replicated_unembeddings_are_distilled_as_they_are_defined():
    hidden, weight, labels = inputs(3)
    draw = torch.Generator().manual_seed(9)
    own = [weight, *(torch.randn(V, D, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))]
    bias_hidden = torch.randn(B, T, R, generator=draw, dtype=torch.float64, requires_grad=True)
    bias_weight = torch.randn(V, R, generator=draw, dtype=torch.float64, requires_grad=True)
    objective = TrainingObjective(divergence="kl")
    teacher_logits = hidden[0] @ weight.T
    # the bias as further columns of hidden states and matrix
    wide = [torch.cat([hidden[k], bias_hidden], dim=-1) for k in (1, 2)]
    wide_weights = [torch.cat([own[k], bias_weight], dim=-1) for k in (1, 2)]
    expected = reference_loss(
        [hidden[0], *wide], [weight, *wide_weights], labels, objective=objective, teacher_logits_BTV=teacher_logits
    )
    bias = LowRankBias(bias_hidden, bias_weight)
    loss = chunked_loss(
        hidden,
        own,
        labels,
        chunk_tokens=5,
        biases=[None, bias, bias],
        distillation=Distillation(objective, own_teacher(hidden, weight)),
    )
    parameters = [*hidden, *own, bias_hidden, bias_weight]
    found, wanted = torch.autograd.grad(loss.total, parameters), torch.autograd.grad(expected, parameters)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert largest_gap(found, wanted) <= 1e-12


def test_a_head_that_agrees_with_its_teacher_has_loss_and_gradient_zero():
    hidden, weight, labels = inputs(1)
    ahead = torch.cat([hidden[0][:, 1:], hidden[0][:, :1]], dim=1).detach().requires_grad_()
    for divergence in DIVERGENCES:
        objective = TrainingObjective(divergence=divergence)
        loss = chunked_loss(
            [hidden[0], ahead], weight, labels, distillation=Distillation(objective, own_teacher(hidden, weight))
        )
        assert abs(loss.objective_per_offset_N[1].item()) < 1e-14, divergence
        assert float(torch.autograd.grad(loss.total, ahead)[0].abs().max()) < 1e-14, divergence


def test_total_variation_is_the_rate_of_rejection_and_bounds_are_those_of_the_field():
    p, q = torch.tensor([[[0.7, 0.3]]]).double().log(), torch.tensor([[[0.4, 0.6]]]).double().log()
    values = {
        name: reference_divergence(
            q, p, torch.zeros(1, 1, dtype=torch.long), offset=1, objective=TrainingObjective(divergence=name)
        ).item()
        for name in DIVERGENCES
    }
    assert values["total_variation"] == pytest.approx(0.3)
    assert values["log_acceptance"] == pytest.approx(-math.log(0.7))
    kl = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert values["kl"] == pytest.approx(kl)
    assert values["hybrid"] == pytest.approx(math.exp(-2.1) * kl + (1 - math.exp(-2.1)) * 0.3)


def test_a_point_mass_as_teacher_makes_the_logarithm_of_the_acceptance_the_cross_entropy():
    hidden, weight, labels = inputs(2)
    certain = torch.nn.functional.one_hot(labels.roll(-1, dims=1), V).double() * 1e4  # t predicts the token at t + 1
    teacher = Teacher(certain, torch.eye(V, dtype=torch.float64), SoftCap())
    got = chunked_loss(
        hidden, weight, labels, distillation=Distillation(TrainingObjective(divergence="log_acceptance"), teacher)
    )
    assert got.objective_per_offset_N[1].item() == pytest.approx(got.per_offset_N[1].item(), rel=1e-12)


def test_buffers_together_have_the_rows_of_a_chunk_and_the_teachers_are_made_once_for_all_offsets(monkeypatch):
    rows, made = [], []
    original = Teacher.distribution
    monkeypatch.setattr(
        Teacher,
        "distribution",
        lambda self, chunk, **kwargs: made.append(chunk.stop - chunk.start) or original(self, chunk, **kwargs),
    )
    of_a_chunk = chunked.distilled_chunk

    def record(targets_C, *args, **kwargs):
        rows.append(targets_C.shape[0])
        return of_a_chunk(targets_C, *args, **kwargs)

    monkeypatch.setattr(chunked, "distilled_chunk", record)
    hidden, weight, labels = inputs(4)
    objective = TrainingObjective(divergence="kl")
    chunked_loss(
        hidden, weight, labels, chunk_tokens=20, distillation=Distillation(objective, own_teacher(hidden, weight))
    ).total.backward()
    assert max(made) == 5
    assert sum(made) == B * T
    assert max(rows) == 5
    assert sum(rows) == 3 * B * T - (1 + 2 + 3)  # the last positions have no teacher ahead


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_with_nan_in_teacher_and_head_changes_nothing(divergence):
    hidden, weight, labels = inputs(3)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :3] = 0
    objective = TrainingObjective(divergence=divergence, cross_entropy_share=0.5)

    def run(states):
        loss = chunked_loss(
            states,
            weight,
            labels,
            attention_mask_BT=mask,
            distillation=Distillation(objective, own_teacher(states, weight)),
        )
        return loss.total, torch.autograd.grad(loss.total, weight)[0]

    clean = run(hidden)
    for states in hidden:
        with torch.no_grad():
            states[1, :3] = torch.nan
    dirty = run(hidden)
    assert dirty[0].item() == clean[0].item()
    assert torch.equal(dirty[1], clean[1])


def test_disjoint_distributions_give_a_large_finite_loss_and_no_nan():
    labels = torch.tensor([[0, 1, 2, 3]])
    far = [torch.zeros(1, 4, V).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        far[0][..., 1], far[1][..., 2] = 1e4, 1e4
    for divergence in DIVERGENCES:
        objective = TrainingObjective(divergence=divergence)
        loss = chunked_loss(
            far, torch.eye(V), labels, distillation=Distillation(objective, own_teacher(far, torch.eye(V)))
        )
        gradient = torch.autograd.grad(loss.total, far[1])[0]
        assert torch.isfinite(loss.total), divergence
        assert torch.isfinite(gradient).all(), divergence


def test_autocast_multiplies_in_bfloat16_and_compares_in_float32():
    hidden, weight, labels = inputs(3, dtype=torch.float32)
    for divergence in DIVERGENCES:
        distilled = Distillation(TrainingObjective(divergence=divergence), own_teacher(hidden, weight))
        exact = chunked_loss(hidden, weight, labels, distillation=distilled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = chunked_loss(hidden, weight, labels, distillation=distilled)
        rounded = [states.bfloat16() for states in hidden], weight.bfloat16()
        expected = reference_loss(*rounded, labels, objective=distilled.objective)
        assert near.total.dtype == torch.float32
        assert near.total.item() != exact.total.item()
        assert near.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "kll"}, "did you mean kl"),
        ({"temperature": 0.5}, "choose another, such as kl"),
        ({"divergence": "kl", "temperature": 0.0}, "must be positive"),
        ({"divergence": "kl", "cross_entropy_share": 1.0}, "leave the divergence at cross_entropy"),
        ({"detach_trunk": "yes"}, "off, on, hidden-states"),
    ],
)
def test_options_that_mean_nothing_are_refused_with_the_way_out(options, words):
    with pytest.raises(ConfigError, match=words):
        TrainingObjective(**options)


def test_the_decay_of_the_hybrid_is_that_of_its_source():
    assert distillation.HYBRID_DECAY == 3.0
