"""What is not served is refused by name, with the way out; limits act inside a block."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from decoding_cases import base_continuation, ragged_batch, script_drafts
from headway.decoding.refusals import check_positions
from headway.errors import DecodingError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


REFUSED = {
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "guidance_scale": 1.5,
    "output_attentions": True,
    "output_hidden_states": True,
    "cache_implementation": "static",
    "prefill_chunk_size": 4,
    "num_return_sequences": 2,
    "assistant_model": object(),
    "custom_generate": lambda *args, **kwargs: None,
    "inputs_embeds": torch.zeros(1, 3, 32),
    "past_key_values": DynamicCache(),
    "position_ids": torch.arange(4)[None],
    "synced_gpus": True,
}


@pytest.mark.parametrize("option", REFUSED)
def test_a_request_that_is_not_served_is_refused_by_name(option, model):
    with pytest.raises(DecodingError, match=option):
        model.generate(random_tokens(1, 4), max_new_tokens=3, **{option: REFUSED[option]})


def test_the_way_out_is_named_and_works(model):
    row = random_tokens(1, 4)
    with pytest.raises(DecodingError, match=r"use model\.base\.generate"):
        model.generate(row, max_new_tokens=3, num_beams=2)
    assert model.base.generate(row, max_new_tokens=3, num_beams=2, do_sample=False).shape == (1, 7)


def test_a_configuration_is_read_as_the_call_is(model):
    row = random_tokens(1, 4)
    with pytest.raises(DecodingError, match="num_beams=3"):
        model.generate(row, generation_config=GenerationConfig(num_beams=3, max_new_tokens=2))
    out = model.generate(row, generation_config=GenerationConfig(max_new_tokens=5))
    assert out[0, 4:].tolist() == base_continuation(model, row, 5)


def test_the_call_overrides_the_models_own_configuration():
    model = tiny_model()
    model.generation_config.num_beams = 3
    row = random_tokens(1, 4)
    with pytest.raises(DecodingError, match="num_beams=3"):
        model.generate(row, max_new_tokens=5)
    expected = base_continuation(model, row, 5, num_beams=1)
    assert model.generate(row, max_new_tokens=5, num_beams=1)[0, 4:].tolist() == expected


def test_the_mixins_own_generate_is_served_and_refused_alike(model):
    row = random_tokens(1, 4)
    assert torch.equal(GenerationMixin.generate(model, row, max_new_tokens=5), model.generate(row, max_new_tokens=5))
    with pytest.raises(DecodingError, match="output_attentions"):
        GenerationMixin.generate(model, row, max_new_tokens=5, output_attentions=True, return_dict_in_generate=True)


def test_attention_that_takes_no_masks_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(DecodingError, match="flash_attention_2"):
        model.generate(random_tokens(1, 4), max_new_tokens=3)


@pytest.mark.parametrize("drafts", [-1, 4, True, 1.0, "2"])
def test_drafts_that_the_heads_cannot_make_are_refused(drafts, model):
    with pytest.raises(DecodingError, match=r"num_draft_tokens must be .*0\.\.3"):
        model.generate(random_tokens(1, 4), max_new_tokens=3, num_draft_tokens=drafts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1: got 0"),
        ({"max_new_tokens": -2}, "got -2"),
        ({"max_length": 4}, "max_length=4 leaves no room after a prompt of 4 tokens"),
        ({"max_length": 2}, "pass max_new_tokens instead"),
    ],
)
def test_limits_without_room_are_refused(options, message, model):
    with pytest.raises(DecodingError, match=message):
        model.generate(random_tokens(1, 4), **options)


def test_arguments_of_forward_that_the_loop_would_drop_are_refused(model):
    with pytest.raises(DecodingError, match="document_ids"):
        model.generate(random_tokens(1, 4), max_new_tokens=3, document_ids=torch.zeros(1, 4))


def test_a_misspelt_argument_is_refused(model):
    with pytest.raises(ValueError, match="max_new_tokenss"):
        model.generate(random_tokens(1, 4), max_new_tokenss=3)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 7])
def test_a_limit_inside_a_block_gives_exactly_so_many_tokens(new, model, monkeypatch):
    batch = ragged_batch([4, 7, 2], "lrl")
    truth = [base_continuation(model, row, 10) for row in batch.rows()]
    script_drafts(monkeypatch, truth, wrong=0.2)
    by_count = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new)
    assert by_count[:, 7:].tolist() == [row[:new] for row in truth]
    script_drafts(monkeypatch, truth, wrong=0.2)
    by_length = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_length=7 + new)
    assert torch.equal(by_length, by_count)


def test_a_length_criterion_of_the_caller_counts(model):
    row = random_tokens(1, 4)
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=9)])
    out = model.generate(row, max_new_tokens=50, stopping_criteria=criteria)
    assert out[0, 4:].tolist() == base_continuation(model, row, 5)


def test_learned_positions_are_used_to_the_last_and_not_beyond():
    config = FAMILIES["gpt2"]()
    config.n_positions = 20
    model = attach_heads(tiny_base("gpt2", n_positions=20), MultiTokenConfig(num_future_tokens=4, head_init="fresh"))
    assert model.config.max_position_embeddings == 20
    batch = ragged_batch([6, 9, 3], "lrl")
    # 9 + 12 tokens: the last of them is chosen at the last position, and is never fed.
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=12)
    assert out[:, 9:].tolist() == [base_continuation(model, row, 12) for row in batch.rows()]
    with pytest.raises(DecodingError, match=r"need 21 positions.*max_new_tokens=12 or less"):
        model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=13)
    with pytest.raises(DecodingError, match="longer than the 20 positions"):
        model.generate(random_tokens(1, 22), max_new_tokens=1)


def test_rotary_models_may_go_beyond_their_nominal_length(model):
    assert model.config.max_position_embeddings == 256
    row = random_tokens(1, 250)
    assert model.generate(row, max_new_tokens=20)[0, 250:].tolist() == base_continuation(model, row, 20)


def _with_rope(kind, **parameters):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **parameters}
    base = tiny_base("llama", rope_parameters=rope, max_position_embeddings=32)
    return attach_heads(base, MultiTokenConfig(num_future_tokens=3, head_init="fresh"))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_scalings_that_are_the_same_at_every_length_decode(kind):
    model = _with_rope(kind, **({"original_max_position_embeddings": 8} if kind == "yarn" else {}))
    row = random_tokens(1, 10)
    assert model.generate(row, max_new_tokens=12)[0, 10:].tolist() == base_continuation(model, row, 12)


def test_rotary_frequencies_that_depend_on_the_length_are_refused_where_they_would_change():
    model = _with_rope("dynamic")
    row = random_tokens(1, 10)
    # 10 + 23 tokens feed 32 positions, the limit.
    assert model.generate(row, max_new_tokens=23)[0, 10:].tolist() == base_continuation(model, row, 23)
    with pytest.raises(DecodingError, match="'dynamic' changes its frequencies at 32 tokens"):
        model.generate(row, max_new_tokens=24)


def test_long_and_short_factors_are_refused_only_where_generation_would_switch_between_them():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    model = _with_rope("longrope", **factors)
    short, long = random_tokens(1, 6), random_tokens(1, 17)
    assert model.generate(short, max_new_tokens=11)[0, 6:].tolist() == base_continuation(model, short, 11)
    assert model.generate(long, max_new_tokens=11)[0, 17:].tolist() == base_continuation(model, long, 11)
    with pytest.raises(DecodingError, match="cross that"):
        model.generate(short, max_new_tokens=12)
    with pytest.raises(DecodingError, match="prompts of 6 to 17"):
        check_positions(model.config, [6, 17], 4)
