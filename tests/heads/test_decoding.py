"""Every architecture drafts losslessly: the text is the plain greedy text, alone and in ragged batches."""

from __future__ import annotations

import copy

import pytest
import torch

from decoding_cases import near_ties, new_tokens, ragged_batch, script_picks
from head_cases import ARCHITECTURES, CHANGES_BASE, head_model
from headway.decoding.executor import EagerExecutor
from headway.model.stack import plain_stack
from tiny_models import random_tokens

NEW = 14
SINGLE = ragged_batch([9], "l")
# A row of one token: shorter than what sequential modules look back.
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
MAIN = ["transformer-2-layers", "causal", "anticausal", "medusa-2-blocks-shared-markov", "hydra", "sequential-shared"]
CASES = [(name, "llama", dtype) for name in ARCHITECTURES for dtype in (torch.float32, torch.float64)] + [
    (name, family, torch.float64) for name in MAIN for family in ("qwen3-sliding", "gemma3_text", "gpt2")
]


def reference(name, model):
    """A model whose own `base.generate` is the truth: the base, or the stack of all layers where heads changed it."""
    if name not in CHANGES_BASE:
        return model
    stack = copy.copy(model)
    stack.__dict__ = dict(model.__dict__)
    stack._modules = {**model._modules, "base": plain_stack(model)}
    return stack


def continuation(base, row, new):
    out = base.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, pad_token_id=0, do_sample=False)
    return out[0, row.shape[1] :].tolist()


@pytest.mark.parametrize(("name", "family", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_acceptance_gives_the_plain_greedy_text(name, family, dtype, monkeypatch):
    model = head_model(name, family, dtype=dtype)
    truth = reference(name, model)
    lengths = set()
    for batch in (SINGLE, RAGGED):
        rows = batch.rows()
        expected = [continuation(truth.base, row, NEW) for row in rows]
        options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "return_dict_in_generate": True}
        columns = batch.input_ids.shape[1]
        results = [model.generate(batch.input_ids, num_draft_tokens=0, **options)]
        results.append(model.generate(batch.input_ids, **options))
        for drafts in (1, 3):
            with monkeypatch.context() as patch:
                script_picks(patch, expected)
                results.append(model.generate(batch.input_ids, num_draft_tokens=drafts, **options))
        lengths.update(length for row in results[-1].acceptance.lengths for length in row)
        for result in results:
            assert torch.equal(result.sequences[:, :columns], batch.input_ids)
            differing = near_ties(truth, rows, new_tokens(result, columns), expected)
            assert differing == 0 or dtype == torch.float32
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_are_the_argmax_of_the_teacher_forced_logits_on_the_drafted_text(name, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    seen = []
    original = EagerExecutor.draft

    def recording(self, states, accepted, *, last_B=None, count):
        drafted = original(self, states, accepted, last_B=last_B, count=count)
        seen.append((last_B.tolist(), drafted.tolist()))
        return drafted

    monkeypatch.setattr(EagerExecutor, "draft", recording)
    result = model.generate(
        RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=12, return_dict_in_generate=True
    )
    checked = 0
    for row, prompt in enumerate(RAGGED.rows()):
        text = prompt[0].tolist()
        new = new_tokens(result, RAGGED.input_ids.shape[1])[row]
        fed = 1  # new tokens that are known when the draft is made; the last of them has not been fed
        for (last, drafted), length in zip(seen, [*result.acceptance.lengths[row], 0], strict=False):
            if len(new) - fed < 1:
                break
            known = [*text, *new[:fed]]
            assert last[row] == known[-1]
            with torch.no_grad():
                logits = model(torch.tensor([known + drafted[row]]), return_future_logits=True).future_logits
            place = len(known) - 2  # the last token that was fed
            expected = [int(logits[0, place, offset - 1].argmax()) for offset in range(2, 2 + len(drafted[row]))]
            assert drafted[row] == expected
            fed += length
            checked += 1
    assert checked > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_thirty_two_future_tokens_decode_in_ragged_batches(name, monkeypatch):
    model = head_model(name, num_future_tokens=32, dtype=torch.float64, perturb=0.05)
    truth = reference(name, model)
    rows = RAGGED.rows()
    expected = [continuation(truth.base, row, 50) for row in rows]
    with monkeypatch.context() as patch:
        script_picks(patch, expected, wrong=0.03)
        result = model.generate(
            RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=50, return_dict_in_generate=True
        )
    assert result.mode == "self-speculative"
    assert near_ties(truth, rows, new_tokens(result, RAGGED.input_ids.shape[1]), expected) == 0
    lengths = [length for row in result.acceptance.lengths for length in row]
    assert max(lengths) > 8
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cached_text_has_the_logits_of_one_without_a_cache(name):
    from headway.decoding.cache import RaggedCache, attention_windows

    model, tokens = head_model(name, dtype=torch.float64), random_tokens(2, 12)
    windows = attention_windows(model.config, num_heads=model.heads.cache_layers(3))
    cache = RaggedCache(windows, batch=2, capacity=12, device=tokens.device)
    cache.begin_aligned(0, 12)
    with torch.no_grad():
        filled = model.offset_hidden_states(tokens, past_key_values=cache, use_cache=True)
        plain = model.offset_hidden_states(tokens, use_cache=False)
        default = model.offset_hidden_states(tokens)
    for states in (filled, default):
        for one, other in zip(states.hidden, plain.hidden, strict=True):
            assert float((one - other).abs().max()) < 1e-5
