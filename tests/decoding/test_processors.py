"""Logits processors and stopping criteria act position by position: equal to transformers' own loop."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from decoding_cases import Batch, script_drafts
from headway.decoding.history import PrefixGate
from tiny_models import VOCABULARY, random_tokens, tiny_model

NEW = 20
PAD = 0


def _left_padded():
    """transformers decodes only left padding right, so that is what can be compared."""
    ids, mask = torch.full((4, 9), PAD), torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate((9, 4, 7, 2)):
        ids[row, -length:] = random_tokens(length, seed=20 + row).clamp(min=1)
        mask[row, -length:] = 1
    return Batch(ids, mask)


BATCHES = {
    "alone": Batch(random_tokens(1, 7, seed=3).clamp(min=1), torch.ones(1, 7, dtype=torch.long)),
    "ragged": _left_padded(),
}


def _allowed(batch_id, ids):
    # Depends on the row and on the last token, so a wrong prefix or a wrong row shows.
    step = 2 + batch_id % 3
    return [token for token in range(VOCABULARY) if (token + int(ids[-1])) % step == 0] or [1]


class _OddThenEven(LogitsProcessor):
    """A custom processor that looks at the whole prefix."""

    def __call__(self, input_ids, scores):
        parity = (input_ids.sum(dim=1) % 2)[:, None]
        tokens = torch.arange(scores.shape[1])[None]
        return scores.masked_fill(tokens % 2 != parity, -50.0)


class _EndsWithMultipleOfSeven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


SETTINGS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "bad_words": {"bad_words_ids": [[3], [5, 6]], "suppress_tokens": [7, 8]},
    "sequence_bias": {"sequence_bias": [[[3], 4.0], [[5, 6], -4.0]]},
    "begin_suppress": {"begin_suppress_tokens": [4, 9]},
    "several eos": {"eos_token_id": [5, 11, 23, 31]},
    "min_new_tokens": {"eos_token_id": [5, 11, 23, 31], "min_new_tokens": 6},
    "min_length": {"eos_token_id": [5, 11, 23, 31], "min_length": 14},
    "forced_eos": {"eos_token_id": 2, "forced_eos_token_id": 2},
    "forced_bos": {"forced_bos_token_id": 3},
    "exponential_decay": {"eos_token_id": 2, "exponential_decay_length_penalty": (3, 1.6)},
    "prefix_allowed": {"prefix_allowed_tokens_fn": _allowed},
    "custom processor": {"logits_processor": LogitsProcessorList([_OddThenEven()])},
    "together": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "eos_token_id": [5, 11],
        "min_new_tokens": 4,
        "logits_processor": LogitsProcessorList([_OddThenEven()]),
    },
    "one new token": {"repetition_penalty": 1.7, "max_new_tokens": 1},
    "two new tokens": {"repetition_penalty": 1.7, "max_new_tokens": 2},
    "plain limits": {"max_new_tokens": 1},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def _by_transformers(model, batch, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD} | options
    return model.base.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)


def _continuations(sequences, columns):
    return [row[columns:].tolist() for row in sequences]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_gives_what_transformers_gives(setting, batch, model, monkeypatch):
    case, options = BATCHES[batch], {"max_new_tokens": NEW} | SETTINGS[setting]
    expected = _by_transformers(model, case, **options)
    common = {"attention_mask": case.attention_mask, "pad_token_id": PAD, **options}
    assert torch.equal(model.generate(case.input_ids, num_draft_tokens=0, **common), expected)
    assert torch.equal(model.generate(case.input_ids, **common), expected)
    script_drafts(monkeypatch, _continuations(expected, case.input_ids.shape[1]))
    assert torch.equal(model.generate(case.input_ids, **common), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_custom_criterion_ends_a_row_inside_a_block(batch, model, monkeypatch):
    case = BATCHES[batch]
    columns = case.input_ids.shape[1]
    truth = _by_transformers(model, case)
    script_drafts(monkeypatch, _continuations(truth, columns), wrong=0.05)
    out = model.generate(
        case.input_ids,
        attention_mask=case.attention_mask,
        max_new_tokens=NEW,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([_EndsWithMultipleOfSeven()]),
    )
    for got, wanted in zip(_continuations(out, columns), _continuations(truth, columns), strict=True):
        end = next((place for place, token in enumerate(wanted) if token % 7 == 0), NEW - 1)
        assert got == (wanted[: end + 1] + [PAD] * NEW)[: len(got)]


def test_max_time_ends_every_row_after_its_next_token(model):
    case = BATCHES["ragged"]
    out = model.generate(case.input_ids, attention_mask=case.attention_mask, max_new_tokens=NEW, max_time=0.0)
    assert out.shape == (4, 10)
    assert torch.equal(out, _by_transformers(model, case, max_new_tokens=1))


def test_end_of_sequence_inside_a_block_ends_the_row_there(model, monkeypatch):
    case = BATCHES["ragged"]
    columns = case.input_ids.shape[1]
    truth = _continuations(_by_transformers(model, case), columns)
    # An id that occurs in some row as the second token of a block of four.
    eos = truth[0][6]
    script_drafts(monkeypatch, truth, wrong=0.0)
    result = model.generate(
        case.input_ids,
        attention_mask=case.attention_mask,
        max_new_tokens=NEW,
        eos_token_id=eos,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in truth]
    width = max(map(len, expected))
    assert _continuations(result.sequences, columns) == [row + [PAD] * (width - len(row)) for row in expected]
    assert result.num_new_tokens.tolist() == [len(row) for row in expected]
    # The prefill gave one token; all others came from forwards, and nothing that the end cut off is counted.
    assert result.acceptance.emitted_tokens.tolist() == [len(row) - 1 for row in expected]
    assert [sum(row) for row in result.acceptance.lengths] == [len(row) - 1 for row in expected]


def test_the_padding_after_a_rows_end_is_the_pad_id_else_an_end_id_else_zero(model):
    case = BATCHES["ragged"]
    columns = case.input_ids.shape[1]
    truth = _continuations(_by_transformers(model, case), columns)
    eos = truth[1][1]
    out = model.generate(case.input_ids, attention_mask=case.attention_mask, max_new_tokens=NEW, eos_token_id=eos)
    row = out[1, columns:].tolist()
    assert set(row[row.index(eos) :]) == {eos}

    class StopSecondRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, True, False, False])

    out = model.generate(
        case.input_ids,
        attention_mask=case.attention_mask,
        max_new_tokens=NEW,
        stopping_criteria=StoppingCriteriaList([StopSecondRow()]),
    )
    assert out[1, columns + 1 :].tolist() == [0] * (NEW - 1)


def test_a_processor_sees_only_true_prefixes_of_the_rows_it_is_asked_about(model, monkeypatch):
    case = BATCHES["ragged"]
    columns = case.input_ids.shape[1]
    seen = []

    def allowed(batch_id, ids):
        seen.append((batch_id, ids.tolist()))
        return list(range(1, VOCABULARY))

    truth = _by_transformers(model, case, prefix_allowed_tokens_fn=lambda batch_id, ids: list(range(1, VOCABULARY)))
    script_drafts(monkeypatch, _continuations(truth, columns))
    out = model.generate(
        case.input_ids, attention_mask=case.attention_mask, max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed
    )
    assert torch.equal(out, truth)
    for batch_id, prefix in seen:
        assert prefix == truth[batch_id, : len(prefix)].tolist()
    # Each prefix of each row was asked about exactly once.
    assert len(seen) == len({(batch_id, len(prefix)) for batch_id, prefix in seen}) == 4 * NEW


def test_a_gate_that_knows_no_rows_asks_about_all():
    gate = PrefixGate(lambda batch_id, ids: [batch_id + 5])
    assert gate(2, torch.tensor([1])) == [7]
    gate.live = frozenset({0})
    assert gate(2, torch.tensor([1])) == [0]
    assert gate(0, torch.tensor([1])) == [5]


def test_without_drafts_processors_are_called_as_transformers_calls_them(model):
    class Recorder(LogitsProcessor):
        def __init__(self):
            self.calls = []

        def __call__(self, input_ids, scores):
            self.calls.append((input_ids.tolist(), scores.dtype, tuple(scores.shape)))
            return scores

    case = BATCHES["ragged"]
    ours, theirs = Recorder(), Recorder()
    model.generate(
        case.input_ids,
        attention_mask=case.attention_mask,
        max_new_tokens=6,
        pad_token_id=PAD,
        num_draft_tokens=0,
        logits_processor=LogitsProcessorList([ours]),
    )
    _by_transformers(model, case, max_new_tokens=6, logits_processor=LogitsProcessorList([theirs]))
    assert ours.calls == theirs.calls


def test_right_padding_shows_processors_the_same_history_as_left_padding(model):
    left = BATCHES["ragged"]
    lengths = left.attention_mask.sum(dim=1)
    turned = torch.stack([row.roll(int(length)) for row, length in zip(left.input_ids, lengths, strict=True)])
    mask = torch.stack([row.roll(int(length)) for row, length in zip(left.attention_mask, lengths, strict=True)])
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "pad_token_id": PAD}
    one = model.generate(left.input_ids, attention_mask=left.attention_mask, **options)
    other = model.generate(turned, attention_mask=mask, **options)
    assert torch.equal(one[:, 9:], other[:, 9:])
    assert torch.equal(other[:, :9], turned)
