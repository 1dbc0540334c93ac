"""Token-order prediction is its definition: a target over the whole vocabulary, ranked by distance."""

from __future__ import annotations

import pytest
import torch

from headway.functional.targets import shift_targets
from headway.losses import token_order
from headway.losses.token_order import UpcomingTokens, token_order_loss

B, T, D, V = 3, 17, 6, 9
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, V, (B, T), generator=GENERATOR)
HIDDEN = torch.randn(B, T, D, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(V, D, generator=GENERATOR, dtype=torch.float64)

DOCUMENTS = {"document_ids_BT": torch.tensor([0] * 5 + [1] * 7 + [2] * 5).expand(B, -1)}
POSITIONS = {"position_ids_BT": torch.tensor([*range(9), *range(8)])[None]}
PADDED = {"attention_mask_BT": torch.tensor([[1] * T, [0] * 4 + [1] * (T - 4), [1] * (T - 3) + [0] * 3])}
IGNORED = torch.where(torch.rand(B, T, generator=GENERATOR) < 0.3, -100, LABELS)
CASES = {
    "plain": (LABELS, {}),
    "documents": (LABELS, DOCUMENTS),
    "positions": (LABELS, POSITIONS),
    "padding": (LABELS, PADDED),
    "ignored": (IGNORED, DOCUMENTS),
}


def naive(hidden, weight, labels, window, options):
    """Cross-entropy against softmax(y) with y over all of the vocabulary, position by position."""
    total, count = 0.0, 0
    targets = [shift_targets(labels, offset=d, **options) for d in range(1, min(window, T) + 1)]
    for row in range(B):
        for t in range(T):
            if targets[0][row, t] == -100:
                continue
            y = torch.full((V,), -torch.inf, dtype=torch.float64)
            for distance in range(len(targets), 0, -1):
                token = int(targets[distance - 1][row, t])
                if token != -100:
                    y[token] = window - distance
            total = total - (torch.softmax(y, 0) * torch.log_softmax(hidden[row, t] @ weight.T, 0)).sum()
            count += 1
    return total / count, count


@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [5, 1024])
def test_value_and_gradients_are_those_of_the_definition(case, window, chunk):
    labels, options = CASES[case]
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    expected, count = naive(hidden, weight, labels, window, options)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = token_order_loss(hidden, weight, UpcomingTokens.of(labels, **options), window=window, chunk_tokens=chunk)
    assert int(loss.num_targets) == count
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-12)
    found = torch.autograd.grad(loss.total, (hidden, weight))
    for gradient, reference in zip(found, wanted, strict=True):
        assert float((gradient - reference).abs().max()) < 1e-13


def test_a_window_of_one_token_is_next_token_prediction():
    loss = token_order_loss(HIDDEN, WEIGHT, UpcomingTokens.of(LABELS), window=1)
    expected = torch.nn.functional.cross_entropy((HIDDEN @ WEIGHT.T)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_count_of_a_whole_step_divides_the_sum():
    upcoming = UpcomingTokens.of(LABELS)
    own = token_order_loss(HIDDEN, WEIGHT, upcoming, window=4)
    halves = [
        token_order_loss(HIDDEN[rows], WEIGHT, UpcomingTokens.of(LABELS[rows]), window=4, count=own.num_targets).total
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(halves).item() == pytest.approx(own.total.item(), rel=1e-12)


def test_a_row_without_targets_has_neither_loss_nor_gradient_nor_nan():
    hidden = HIDDEN.clone().requires_grad_()
    loss = token_order_loss(hidden, WEIGHT, UpcomingTokens.of(torch.full((B, T), -100)), window=4)
    loss.total.backward()
    assert loss.total.item() == 0
    assert not hidden.grad.any()


def test_one_chunk_of_logits_and_of_windows_is_alive(monkeypatch):
    sizes = []
    original = token_order.LogitChunk.of.__func__

    def record(cls, hidden, weights, **kwargs):
        chunk = original(cls, hidden, weights, **kwargs)
        sizes.append(tuple(chunk.logits_CV.shape))
        return chunk

    monkeypatch.setattr(token_order.LogitChunk, "of", classmethod(record))
    token_order_loss(HIDDEN, WEIGHT, UpcomingTokens.of(LABELS), window=4, chunk_tokens=7)
    assert sizes == [(7, V)] * 7 + [(2, V)]


def test_autocast_multiplies_in_its_type_and_sums_in_float32():
    hidden, weight = HIDDEN.float().requires_grad_(), WEIGHT.float().requires_grad_()
    exact = token_order_loss(hidden, weight, UpcomingTokens.of(LABELS), window=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = token_order_loss(hidden, weight, UpcomingTokens.of(LABELS), window=4)
    assert rough.total.dtype == torch.float32
    assert rough.total.item() == pytest.approx(exact.total.item(), rel=2e-2)
    assert rough.total.item() != exact.total.item()
