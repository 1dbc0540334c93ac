"""No head gets lost: every architecture round-trips bit for bit, and a changed base is never taken for a plain model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from head_cases import ARCHITECTURES, CHANGES_BASE, head_model
from headway.data.tokenizers import byte_tokenizer
from headway.errors import CheckpointError, ConfigError
from headway.model.base_folder import read_base_config
from headway.model.checkpoint import read_multi_token_config
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.stack import plain_stack
from tiny_models import random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 9)


def all_logits(model):
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


def same(one, other):
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_has_bit_equal_logits_at_every_offset(name, family, tmp_path):
    model = head_model(name, family)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    again = MultiTokenLM.from_pretrained(tmp_path / "m")
    assert again.mtp_config == model.mtp_config
    assert same(all_logits(again), all_logits(model))
    if name in CHANGES_BASE:
        return
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(plain(TOKENS).logits, model.base(TOKENS).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_alone_round_trip_on_their_base(name, tmp_path):
    model = head_model(name)
    model.save_heads(tmp_path / "heads")
    again = MultiTokenLM.from_pretrained(tmp_path / "heads", base=tiny_base("llama"))
    assert same(all_logits(again), all_logits(model))
    with pytest.raises(CheckpointError, match="another base"):
        MultiTokenLM.from_pretrained(tmp_path / "heads", base=tiny_base("llama", seed=1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tensor_that_is_missing_is_named(name, tmp_path):
    model = head_model(name)
    state = model.state_dict()
    lost = next(key for key in state if key.startswith("heads."))
    state.pop(lost)
    with pytest.raises(CheckpointError, match=lost.removeprefix("heads.")):
        model.save_pretrained(tmp_path / "m", state_dict=state)
    assert not (tmp_path / "m").exists()


def test_a_changed_base_is_refused_by_plain_loaders_and_says_why(tmp_path):
    model = head_model("anticausal")
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    for load in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        for place in (tmp_path / "m", tmp_path / "m" / "mtp" / "base"):
            with pytest.raises((ValueError, OSError)):
                load(place)
    assert "next-token path" in json.loads((tmp_path / "m" / "config.json").read_text())["why"]
    assert not list((tmp_path / "m").glob("*.safetensors"))
    assert read_base_config(tmp_path / "m").num_hidden_layers == 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == len(byte_tokenizer())
    assert same(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m", dtype=torch.float32)), all_logits(model))


def test_a_plain_and_a_changed_base_replace_each_other_without_leftovers(tmp_path):
    for name in ("anticausal", "transformer", "anticausal"):
        model = head_model(name)
        model.save_pretrained(tmp_path / "m", overwrite=True)
        assert same(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), all_logits(model))
        assert (tmp_path / "m" / "mtp" / "base").exists() == (name == "anticausal")
        assert (tmp_path / "m" / "model.safetensors").exists() == (name != "anticausal")


@pytest.mark.parametrize("damage", ["no base_config", "no weights", "no type"])
def test_damage_to_a_changed_base_is_one_clear_error(damage, tmp_path):
    head_model("anticausal").save_pretrained(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    document = json.loads(config.read_text())
    if damage == "no base_config":
        document.pop("base_config")
    elif damage == "no type":
        document["base_config"].pop("model_type")
    else:
        (tmp_path / "m" / "mtp" / "base" / "model.safetensors").unlink()
    config.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"damaged|half written|does not describe"):
        MultiTokenLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "family", ["llama", "llama-gqa-tied", "qwen3-sliding", "gemma3_text-capped", "gpt2", "gpt_neox"]
)
@pytest.mark.parametrize("name", sorted(CHANGES_BASE))
def test_the_stack_of_all_layers_is_the_plain_model_of_a_changed_base(name, family, tmp_path):
    model = head_model(name, family)
    plain = plain_stack(model)
    assert plain.config.num_hidden_layers == 6
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert float((again(TOKENS).logits - expected).abs().max()) < 1e-5
        assert float((model.base(TOKENS).logits - expected).abs().max()) > 1e-2


def test_only_a_changed_base_has_another_plain_model():
    with pytest.raises(ConfigError, match=r"model\.base"):
        plain_stack(tiny_model())


def test_models_of_the_first_version_load_and_are_written_as_before(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    record = json.loads((tmp_path / "m" / "mtp" / "config.json").read_text())
    first = {
        "num_future_tokens": 4,
        "heads": "transformer",
        "wiring": "parallel",
        "offset_weights": None,
        "head_init": "fresh",
        "loss_chunk_tokens": 1024,
    }
    assert record["format_version"] == 1
    assert record["multi_token"] == first
    assert MultiTokenConfig.from_dict(first) == model.mtp_config
    assert read_multi_token_config(tmp_path / "m") == model.mtp_config
