"""From a configuration, from a size of the paper, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from headway.errors import ConfigError, IncompatibleModelError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import PAPER_SIZES, paper_config
from tiny_models import FAMILIES, random_tokens, tiny_base


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_a_config_has_the_parameters_of_the_plain_model_with_all_layers(family):
    config = FAMILIES[family]()
    plain = AutoModelForCausalLM.from_config(FAMILIES[family]())
    model = MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=3))
    assert config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 1
    assert model.num_parameters() == plain.num_parameters()
    layer_types = getattr(model.config, "layer_types", None)
    assert layer_types is None or len(layer_types) == 1
    tokens = random_tokens(1, 8)
    logits = model.eval()(tokens, return_future_logits=True).future_logits
    assert not torch.equal(logits[:, :, 1], logits[:, :, 2])
    assert not torch.equal(logits[:, :, 0], logits[:, :, 1])


def test_saved_configurations_of_cut_models_load_as_plain_models(tmp_path):
    for family in ("qwen3-sliding", "gemma3_text", "gemma2"):
        model = MultiTokenLM.from_config(FAMILIES[family](), MultiTokenConfig(num_future_tokens=2))
        model.save_pretrained(tmp_path / family)
        config = AutoConfig.from_pretrained(tmp_path / family)
        assert config.num_hidden_layers == 2
        assert len(config.layer_types) == 2


@pytest.mark.parametrize("num_future_tokens", [4, 7])
def test_more_future_tokens_than_layers_are_refused(num_future_tokens):
    with pytest.raises(ConfigError, match="lower num_future_tokens to 3"):
        MultiTokenLM.from_config(FAMILIES["llama"](), MultiTokenConfig(num_future_tokens=num_future_tokens))


# Gloeckle et al. 2024, Table S14: the first seven names count parameters without embeddings, the others with a 32k vocabulary.
NON_EMBEDDING = {"1M": 1e6, "3M": 3e6, "10M": 10e6, "30M": 30e6, "100M": 100e6, "300M": 300e6, "1B": 1e9}
TOTAL = {"0.3B": 0.3e9, "0.6B": 0.6e9, "1.3B": 1.3e9, "3B": 3e9, "6.7B": 6.7e9, "13B": 13e9}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_sizes_of_the_paper_have_the_parameters_that_their_names_say(name):
    with torch.device("meta"):
        model = MultiTokenLM.from_config(paper_config(name), MultiTokenConfig(num_future_tokens=4))
    embeddings = 2 * 32000 * PAPER_SIZES[name].dim
    count = model.num_parameters() - (embeddings if name in NON_EMBEDDING else 0)
    assert count == pytest.approx((NON_EMBEDDING | TOTAL)[name], rel=0.08)


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"Table S14 has 1M"):
        paper_config("2B")


@pytest.mark.parametrize(
    ("model_type", "changes", "match"),
    [
        ("mixtral", {"num_local_experts": 2, "intermediate_size": 32}, "mixture-of-experts"),
        ("mamba", {}, "families that work: gemma2"),
        ("bloom", {}, "have not been checked"),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 32}, "mixture-of-experts"),
    ],
)
def test_other_families_are_refused_by_what_differs(model_type, changes, match):
    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, **changes
    )
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(IncompatibleModelError, match=match):
        attach_heads(base, MultiTokenConfig(num_future_tokens=2))
    with pytest.raises(IncompatibleModelError, match=match):
        MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=2))


def test_a_known_family_with_a_foreign_setting_is_refused():
    base = tiny_base("gemma3_text")
    base.config.use_bidirectional_attention = True
    with pytest.raises(IncompatibleModelError, match="bidirectional attention"):
        attach_heads(base, MultiTokenConfig(num_future_tokens=2))
    with pytest.raises(IncompatibleModelError, match="AutoModelForCausalLM"):
        attach_heads(tiny_base("llama").model, MultiTokenConfig(num_future_tokens=2))
    with pytest.raises(IncompatibleModelError, match="Hugging Face causal LM"):
        attach_heads("llama", MultiTokenConfig(num_future_tokens=2))


def test_a_model_that_scales_its_logits_is_caught_by_the_parity_run():
    base = tiny_base("llama")
    own_forward = base.forward

    def scaled(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    base.forward = scaled
    with pytest.raises(IncompatibleModelError, match="own logits differ"):
        attach_heads(base, MultiTokenConfig(num_future_tokens=2))


def test_attaching_keeps_the_training_mode_and_shares_nothing_with_the_last_layer():
    for training in (False, True):
        base = tiny_base("llama").train(training)
        model = attach_heads(base, MultiTokenConfig(num_future_tokens=4))
        assert base.training is training
        assert model.training is training
        pointers = [p.data_ptr() for p in model.parameters()]
        assert len(set(pointers)) == len(pointers)
        last = dict(model.family.last_layer.named_parameters())
        assert all(torch.equal(p, last[name]) for head in model.heads for name, p in head.named_parameters())
        assert [head.self_attn.layer_idx for head in model.heads] == [3, 4, 5]


def test_heads_can_be_attached_twice_to_one_base():
    base = tiny_base("llama")
    tokens = random_tokens(1, 6)
    first = attach_heads(base, MultiTokenConfig(num_future_tokens=3))
    second = attach_heads(base, MultiTokenConfig(num_future_tokens=2, head_init="fresh"))
    expected = base(tokens).logits
    assert torch.equal(first(tokens, return_future_logits=True).future_logits[:, :, 0], expected)
    assert torch.equal(second(tokens, return_future_logits=True).future_logits[:, :, 0], expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_future_tokens": 0}, ">= 1"),
        ({"num_future_tokens": True}, ">= 1"),
        ({"num_future_tokens": 2.0}, ">= 1"),
        ({"num_future_tokens": 2, "heads": "mamba"}, "must be one of transformer"),
        ({"num_future_tokens": 2, "offset_weights": (1.0,)}, "pass 2 numbers"),
        ({"num_future_tokens": 2, "offset_weights": (1.0, float("nan"))}, "finite"),
        ({"num_future_tokens": 2, "loss_chunk_tokens": 0}, "loss_chunk_tokens"),
    ],
)
def test_configuration_values_out_of_range_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        MultiTokenConfig(**fields)


def test_configurations_round_trip_and_unknown_fields_name_the_nearest():
    config = MultiTokenConfig(num_future_tokens=3, offset_weights=(1, 0.5, 0.25))
    assert MultiTokenConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="did you mean num_future_tokens"):
        MultiTokenConfig.from_dict({"num_future_token": 3})


def test_meta_models_are_built_without_weights():
    with torch.device("meta"):
        model = MultiTokenLM.from_config(LlamaConfig(num_hidden_layers=4), MultiTokenConfig(num_future_tokens=2))
    assert all(parameter.is_meta for parameter in model.parameters())
