"""Documents packed into a row neither see nor predict each other, also in the default call."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ConfigError
from tiny_models import FAMILIES, random_tokens, tiny_model

FIRST, SECOND = 7, 9
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None].expand(2, -1)
DOCUMENTS = torch.cat([torch.zeros(FIRST), torch.ones(SECOND)]).long()[None].expand(2, -1)
CALLS = {
    "positions only": {"position_ids": POSITIONS},
    "mask of ones": {"position_ids": POSITIONS, "attention_mask": torch.ones(2, FIRST + SECOND, dtype=torch.long)},
    "cache asked for": {"position_ids": POSITIONS, "use_cache": True},
    "document ids only": {"document_ids": DOCUMENTS},
    "both": {"position_ids": POSITIONS, "document_ids": DOCUMENTS},
}


def changed_first_document() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = random_tokens(2, FIRST + SECOND)
    other = tokens.clone()
    other[:, :FIRST] = (other[:, :FIRST] + 1) % 40
    return tokens, other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_a_document_does_not_change_when_the_one_before_it_does(family, training):
    tokens, other = changed_first_document()
    model = tiny_model(family, num_future_tokens=3).train(training)
    for name, call in CALLS.items():
        logits = model(tokens, return_future_logits=True, **call)
        changed = model(other, return_future_logits=True, **call)
        assert logits.past_key_values is None, name
        assert torch.equal(logits.future_logits[:, FIRST:], changed.future_logits[:, FIRST:]), name
        assert not torch.equal(logits.future_logits[:, :FIRST], changed.future_logits[:, :FIRST]), name


# Transformers refuses sdpa for gemma2, whose attention scores are capped.
@pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]
)
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(family, attention):
    model = tiny_model(family, num_future_tokens=3)
    model.base.set_attn_implementation(attention)
    tokens, _ = changed_first_document()
    packed = model(tokens, return_future_logits=True, **CALLS["mask of ones"]).future_logits
    alone = model(tokens[:, FIRST:], return_future_logits=True, use_cache=False).future_logits
    assert float((packed[:, FIRST:] - alone).abs().max()) < 2e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mistral-sliding"])
def test_packed_loss_is_the_mean_over_the_documents_own_targets(family):
    tokens, _ = changed_first_document()
    model = tiny_model(family, num_future_tokens=3)
    packed = model(tokens, labels=tokens, position_ids=POSITIONS, attention_mask=torch.ones_like(tokens))
    parts = [model(tokens[:, :FIRST], labels=tokens[:, :FIRST]), model(tokens[:, FIRST:], labels=tokens[:, FIRST:])]
    for offset in range(1, 4):
        counts = [FIRST - offset, SECOND - offset]
        expected = sum(p.loss_per_offset[offset - 1] * c for p, c in zip(parts, counts, strict=True)) / sum(counts)
        assert packed.loss_per_offset[offset - 1].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing_and_an_all_masked_row_gives_no_nan(family):
    tokens = random_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = tokens.masked_fill(mask == 0, -100)
    model = tiny_model(family, num_future_tokens=3).train()
    out = model(tokens, attention_mask=mask, position_ids=positions, labels=labels)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    logits = model(tokens, attention_mask=mask, position_ids=positions, return_future_logits=True, use_cache=False)
    alone = model(tokens[:1, 5:], return_future_logits=True, use_cache=False).future_logits
    assert float((logits.future_logits[:1, 5:] - alone).abs().max()) < 2e-4
    alone_loss = [model(tokens[:1, 5:], labels=tokens[:1, 5:]), model(tokens[1:2], labels=tokens[1:2])]
    expected = (alone_loss[0].loss_per_offset[0] * 6 + alone_loss[1].loss_per_offset[0] * 11) / 17
    assert out.loss_per_offset[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_and_packing_in_one_row():
    model = tiny_model("llama", num_future_tokens=3)
    tokens = random_tokens(1, 14)
    mask = torch.tensor([[0] * 3 + [1] * 11])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(tokens, attention_mask=mask, position_ids=positions, return_future_logits=True).future_logits
    for part in (slice(3, 7), slice(7, 14)):
        alone = model(tokens[:, part], return_future_logits=True, use_cache=False).future_logits
        assert float((packed[:, part] - alone).abs().max()) < 2e-4


def test_rows_shorter_than_n_and_all_masked_batches_train():
    model = tiny_model("llama", num_future_tokens=4).train()
    tokens = random_tokens(2, 2)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    assert out.loss_per_offset[1:].tolist() == [0, 0, 0]
    model.zero_grad()
    nothing = model(tokens, labels=torch.full_like(tokens, -100))
    nothing.loss.backward()
    assert nothing.loss.item() == 0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_several_documents_cannot_continue_a_cache():
    model = tiny_model("llama", num_future_tokens=1)
    tokens = random_tokens(1, 8)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="one document per row"):
        model(tokens, past_key_values=cache, position_ids=torch.tensor([[8, 9, 10, 0, 1, 2, 3, 4]]))
