"""Stop strings end a row inside a block; text streamers show the text."""

from __future__ import annotations

import pytest
import torch
from transformers import TextStreamer

from decoding_cases import script_drafts
from headway.data.tokenizers import BYTE_VOCABULARY_SIZE, byte_tokenizer
from headway.decoding.requests import Request
from headway.decoding.scheduler import Scheduler
from headway.errors import DecodingError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import tiny_base


@pytest.fixture(scope="module")
def model():
    base = tiny_base("llama")
    base.resize_token_embeddings(BYTE_VOCABULARY_SIZE, mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_()
        # Printable text only, so that every token is a character.
        base.get_output_embeddings().weight.normal_(std=0.5)
        base.get_output_embeddings().weight[127:] *= 0
        base.get_output_embeddings().weight[:32] *= 0
    return attach_heads(base, MultiTokenConfig(num_future_tokens=4, head_init="fresh"))


def test_a_stop_string_ends_the_text_where_it_is_complete(model, monkeypatch):
    tokenizer = byte_tokenizer()
    row = torch.tensor([tokenizer.encode("def f", add_special_tokens=False)])
    options = {"max_new_tokens": 24, "pad_token_id": 257}
    whole = model.base.generate(row, attention_mask=torch.ones_like(row), do_sample=False, **options)
    text = tokenizer.decode(whole[0, 5:])
    stop = text[9:12]
    expected = model.base.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, stop_strings=[stop], tokenizer=tokenizer, **options
    )
    assert expected.shape[1] < whole.shape[1]
    script_drafts(monkeypatch, [whole[0, 5:].tolist()], wrong=0.1)
    out = model.generate(row, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert torch.equal(out, expected)
    for drafts in ({"tree": 10}, {"drafts": "heads+lookup"}):
        assert torch.equal(model.generate(row, stop_strings=[stop], tokenizer=tokenizer, **drafts, **options), expected)


def test_a_text_streamer_prints_the_text(model, capsys):
    tokenizer = byte_tokenizer()
    row = torch.tensor([tokenizer.encode("x = ", add_special_tokens=False)])
    out = model.generate(row, max_new_tokens=20, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(out[0, 4:]) + "\n"


def test_stop_strings_of_one_request_end_it_and_no_other(model):
    tokenizer = byte_tokenizer()
    row = torch.tensor([tokenizer.encode("def f", add_special_tokens=False)])
    whole = model.generate(row, max_new_tokens=24, pad_token_id=257)[0, 5:]
    stop = tokenizer.decode(whole)[9:12]
    expected = model.generate(row, max_new_tokens=24, pad_token_id=257, stop_strings=[stop], tokenizer=tokenizer)
    scheduler = Scheduler(model, tokenizer=tokenizer)
    handles = [scheduler.submit(Request(row[0].tolist(), 24, stop_strings=strings)) for strings in ([stop], [])]
    stopped, free = (handle.result() for handle in handles)
    assert stopped.tokens == expected[0, 5:].tolist()
    assert (stopped.finish_reason, stopped.stopped_by) == ("stop", "criterion")
    assert (free.tokens, free.finish_reason) == (whole.tolist(), "length")
    with pytest.raises(DecodingError, match="need the tokenizer"):
        Scheduler(model).submit(Request([1], 3, stop_strings=[stop]))
