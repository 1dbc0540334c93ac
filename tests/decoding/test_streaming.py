"""Tokens reach a streamer once and in order; Ctrl-C keeps them; blocks can be watched one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from decoding_cases import base_continuation, new_tokens, ragged_batch, script_drafts
from headway.decoding.blocks import stream_blocks
from headway.decoding.executor import EagerExecutor
from headway.errors import DecodingError
from tiny_models import random_tokens, tiny_model

NEW = 18


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class Recorder:
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ends += 1


def _interrupt_after(monkeypatch, forwards):
    """Raise KeyboardInterrupt inside the model, as Ctrl-C does, after so many blocks."""
    block, calls = EagerExecutor.block, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > forwards:
            raise KeyboardInterrupt
        return block(self, *args, **kwargs)

    monkeypatch.setattr(EagerExecutor, "block", interrupted)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["fast", "processors"])
def test_a_streamer_gets_the_prompt_then_every_token_once_and_in_order(options, model, monkeypatch):
    row, streamer = random_tokens(1, 6), Recorder()
    truth = base_continuation(model, row, NEW, **options)
    script_drafts(monkeypatch, [truth])
    out = model.generate(row, max_new_tokens=NEW, streamer=streamer, **options)
    assert torch.equal(streamer.puts[0], row)
    assert [put.tolist() for put in streamer.puts[1:]] == [[token] for token in truth]
    assert streamer.ends == 1
    assert out[0, 6:].tolist() == truth


@pytest.mark.parametrize(
    "options",
    [{"tree": 9}, {"drafts": "lookup"}, {"do_sample": True, "seed": 1, "top_k": 0}],
    ids=["tree", "copies", "sampling"],
)
def test_a_streamer_and_a_watcher_get_what_any_draft_gives(options, model):
    row, streamer = random_tokens(1, 6), Recorder()
    plain = model.generate(row, max_new_tokens=NEW, **(options | {"num_draft_tokens": 0}))[0, 6:].tolist()
    model.generate(row, max_new_tokens=NEW, streamer=streamer, **options)
    assert [put.item() for put in streamer.puts[1:]] == plain
    stream = stream_blocks(model, row, max_new_tokens=NEW, **options)
    assert [token for block in stream for token in block[0]] == plain


def test_a_streamer_is_ended_when_generation_fails(model):
    class Explode(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise RuntimeError("criterion failed")

    streamer = Recorder()
    with pytest.raises(RuntimeError, match="criterion failed"):
        model.generate(
            random_tokens(1, 4),
            max_new_tokens=4,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([Explode()]),
        )
    assert streamer.ends == 1


def test_a_streamer_of_several_rows_is_refused_before_it_hears_anything(model):
    streamer = Recorder()
    with pytest.raises(DecodingError, match="one prompt at a time"):
        model.generate(random_tokens(2, 4), max_new_tokens=4, streamer=streamer)
    assert streamer.puts == []


@pytest.mark.parametrize("forwards", [0, 3])
def test_ctrl_c_returns_what_was_generated(forwards, model, monkeypatch):
    batch = ragged_batch([4, 7, 2], "lrl")
    columns = batch.input_ids.shape[1]
    truth = [base_continuation(model, row, NEW) for row in batch.rows()]
    script_drafts(monkeypatch, truth)
    _interrupt_after(monkeypatch, forwards)
    result = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert result.acceptance.interrupted
    assert result.acceptance.forwards.tolist() == [forwards] * 3
    kept = new_tokens(result, columns)
    assert kept == [row[: len(got)] for row, got in zip(truth, kept, strict=True)]
    assert [len(row) for row in kept] == [1 + sum(row) for row in result.acceptance.lengths]
    for text, got in zip(result.sequences[:, columns:].tolist(), kept, strict=True):
        assert text == got + [0] * (len(text) - len(got))


def test_ctrl_c_ends_the_streamer_after_exactly_the_returned_tokens(model, monkeypatch):
    row, streamer = random_tokens(1, 6), Recorder()
    _interrupt_after(monkeypatch, 4)
    out = model.generate(row, max_new_tokens=NEW, streamer=streamer)
    assert [int(put) for put in streamer.puts[1:]] == out[0, 6:].tolist()
    assert out.shape[1] > 6 + 4
    assert streamer.ends == 1


def test_ctrl_c_during_the_prefill_returns_the_prompt(model, monkeypatch):
    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(EagerExecutor, "prefill", interrupted)
    row = random_tokens(2, 6)
    result = model.generate(row, max_new_tokens=NEW, return_dict_in_generate=True)
    assert torch.equal(result.sequences, row)
    assert result.acceptance.interrupted
    assert result.num_new_tokens.tolist() == [0, 0]


@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 0}, {"repetition_penalty": 1.3}])
def test_watched_blocks_are_the_generation(options, model):
    batch = ragged_batch([4, 7, 2], "lrl")
    common = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "eos_token_id": [3, 17, 21]} | options
    whole = model.generate(batch.input_ids, return_dict_in_generate=True, **common)
    stream = stream_blocks(model, batch.input_ids, **common)
    blocks = list(stream)
    assert next(stream, None) is None
    for row in range(3):
        assert [token for block in blocks for token in block[row]] == new_tokens(whole, 7)[row]
        assert [len(block[row]) for block in blocks[1:] if block[row]] == whole.acceptance.lengths[row]
    assert torch.equal(stream.result.sequences, whole.sequences)
    assert stream.result.acceptance.to_dict() == whole.acceptance.to_dict()


def test_a_stream_can_be_left_early_and_leaves_no_trace(model):
    stream = stream_blocks(model, random_tokens(1, 5), max_new_tokens=NEW)
    first = next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert stream.result.sequences[0, 5:].tolist() == first[0]


def test_a_stream_takes_no_streamer(model):
    with pytest.raises(DecodingError, match="read the tokens of each step"):
        stream_blocks(model, random_tokens(1, 5), max_new_tokens=3, streamer=Recorder())
