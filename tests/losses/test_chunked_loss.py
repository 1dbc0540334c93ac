"""The chunked loss is the naive one: value and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DataError
from headway.functional.logits import SoftCap
from headway.functional.targets import count_valid_targets
from headway.losses import chunked
from headway.losses.chunked import chunked_loss
from headway.losses.reference import reference_loss

B, T, D, V = 3, 9, 8, 13


def inputs(num_offsets: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(B, T, D, generator=generator, dtype=dtype).requires_grad_() for _ in range(num_offsets)]
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    return hidden, weight, labels


def relative_gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max().clamp(min=1e-300))


@settings(max_examples=40, deadline=None)
@given(
    num_offsets=st.integers(1, 12),  # also more offsets than positions
    chunk_tokens=st.integers(1, 40),
    ignored=st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, T - 1)), max_size=20),
    restart=st.integers(1, T),
    padded=st.integers(0, T),
    cap=st.sampled_from([None, 1.5]),
    weights=st.booleans(),
    seed=st.integers(0, 100),
)
def test_value_and_gradients_equal_the_definition_to_1e_12(
    num_offsets, chunk_tokens, ignored, restart, padded, cap, weights, seed
):
    hidden, weight, labels = inputs(num_offsets, seed=seed)
    for row, position in ignored:
        labels[row, position] = -100
    positions = torch.cat([torch.arange(restart), torch.arange(T - restart)])[None].expand(B, T)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :padded] = 0
    common = {
        "position_ids_BT": positions,
        "attention_mask_BT": mask,
        "offset_weights": [0.5 + k for k in range(num_offsets)] if weights else None,
    }
    expected = reference_loss(hidden, weight, labels, logits_transform=SoftCap(cap), **common)
    expected_gradients = torch.autograd.grad(3 * expected, [*hidden, weight])
    got = chunked_loss(hidden, weight, labels, soft_cap=SoftCap(cap), chunk_tokens=chunk_tokens, **common)
    gradients = torch.autograd.grad(3 * got.total, [*hidden, weight])
    assert abs(got.total.item() - expected.item()) <= 1e-12 * max(1.0, abs(expected.item()))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert float((gradient - reference).abs().max()) <= 1e-12 * max(1.0, float(reference.abs().max()))
    assert (
        got.num_targets_N.tolist()
        == count_valid_targets(
            labels, num_future_tokens=num_offsets, position_ids_BT=positions, attention_mask_BT=mask
        ).tolist()
    )


def test_per_offset_values_are_the_means_that_make_up_the_total():
    hidden, weight, labels = inputs(4)
    loss = chunked_loss(hidden, weight, labels)
    assert loss.total.item() == pytest.approx(loss.per_offset_N.sum().item(), rel=1e-14)
    for offset in range(1, 5):
        logits = hidden[offset - 1][:, : T - offset] @ weight.T
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, offset:].flatten())
        assert loss.per_offset_N[offset - 1].item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_correct_targets_are_those_that_the_argmax_names(cap, chunk_tokens):
    hidden, weight, labels = inputs(3, seed=5)
    labels[0, 3:6] = -100
    with torch.no_grad():
        for offset in (1, 2):  # so that a good part of the targets is predicted
            hidden[offset - 1][:, : T - offset] += weight[labels[:, offset:].clamp(min=0)]
    loss = chunked_loss(hidden, weight, labels, soft_cap=SoftCap(cap), chunk_tokens=chunk_tokens)
    expected = []
    for offset in (1, 2, 3):
        targets, predicted = labels[:, offset:], (hidden[offset - 1][:, : T - offset] @ weight.T).argmax(-1)
        expected.append(int(((predicted == targets) & (targets != -100)).sum()))
    assert loss.num_correct_N.tolist() == expected
    assert 0 < expected[0] < loss.num_targets_N[0]


def test_counts_of_a_whole_step_make_micro_batches_add_up_to_the_mean():
    hidden, weight, labels = inputs(3)
    labels[1, 4:] = -100
    whole = chunked_loss(hidden, weight, labels)
    whole_gradient = torch.autograd.grad(whole.total, weight)[0]
    counts = count_valid_targets(labels, num_future_tokens=3)
    parts = [
        chunked_loss(
            [h[row : row + 1] for h in hidden], weight, labels[row : row + 1], num_valid_targets_N=counts
        ).total
        for row in range(B)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-13)
    assert relative_gap(torch.autograd.grad(sum(parts), weight)[0], whole_gradient) < 1e-12


def test_nothing_to_predict_gives_zero_loss_and_zero_gradients_even_next_to_nan():
    hidden, weight, labels = inputs(3)
    labels[:] = -100
    with torch.no_grad():
        hidden[0][0, 0] = float("nan")
    loss = chunked_loss(hidden, weight, labels)
    gradients = torch.autograd.grad(loss.total, [*hidden, weight])
    assert loss.total.item() == 0
    assert loss.per_offset_N.tolist() == [0, 0, 0]
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_error_is_no_worse_than_the_definitions(dtype):
    hidden, weight, labels = inputs(4, dtype=dtype)
    exact = reference_loss([h.double() for h in hidden], weight.double(), labels)
    exact_gradient = torch.autograd.grad(exact, weight)[0]
    naive = reference_loss(hidden, weight, labels)
    fast = chunked_loss(hidden, weight, labels, chunk_tokens=5).total
    slack = 1e-6 if dtype == torch.float32 else 2e-3
    assert abs(fast.item() - exact.item()) <= abs(naive.item() - exact.item()) + slack
    error = [float((torch.autograd.grad(value, weight)[0] - exact_gradient).abs().max()) for value in (naive, fast)]
    assert error[1] <= error[0] + slack


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    hidden, weight, labels = inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(hidden, weight, labels)
        naive = sum(
            torch.nn.functional.cross_entropy(
                torch.nn.functional.linear(h[:, : T - k], weight).float().flatten(0, 1), labels[:, k:].flatten()
            )
            for k, h in enumerate(hidden, start=1)
        )
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(naive.item(), rel=1e-6)
    assert loss.total.item() != reference_loss(hidden, weight, labels).item()


def test_no_more_than_one_chunk_of_one_offsets_logits_is_ever_alive(monkeypatch):
    seen = []
    original = chunked._chunk

    def record(targets_CK, **kwargs):
        seen.append(targets_CK.shape[0])
        return original(targets_CK, **kwargs)

    monkeypatch.setattr(chunked, "_chunk", record)
    hidden, weight, labels = inputs(3)
    chunked_loss(hidden, weight, labels, chunk_tokens=10).total.backward()
    assert max(seen) == 10
    assert sum(seen) == 3 * B * T


def test_evaluation_computes_no_gradients():
    hidden, weight, labels = inputs(2)
    with torch.no_grad():
        loss = chunked_loss(hidden, weight, labels)
    assert not loss.total.requires_grad
    assert loss.total.item() == pytest.approx(reference_loss(hidden, weight, labels).item(), rel=1e-13)


def test_a_frozen_unembedding_gets_no_gradient_and_the_hidden_states_still_do():
    hidden, weight, labels = inputs(2)
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, labels).total.backward()
    assert weight.grad is None
    assert all(float(h.grad.abs().max()) > 0 for h in hidden)


def test_a_label_outside_the_vocabulary_is_refused_with_the_way_out():
    hidden, weight, labels = inputs(2)
    labels[0, 3] = V
    with pytest.raises(DataError, match="model's own tokenizer"):
        chunked_loss(hidden, weight, labels)


def test_counts_of_another_length_are_refused():
    hidden, weight, labels = inputs(2)
    with pytest.raises(DataError, match="count_valid_targets"):
        chunked_loss(hidden, weight, labels, num_valid_targets_N=torch.ones(3))
