import json

import pytest
import torch
from transformers import LlamaConfig

from headway.data.tokenizers import byte_tokenizer
from headway.errors import ConfigError
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import paper_config
from headway.training.config import TrainConfig
from headway.training.initialization import scaled_initialization
from headway.training.model_building import base_config, multi_token_config


def shape_of(**fields):
    return base_config(TrainConfig(**fields), byte_tokenizer())


def build(**fields):
    config = TrainConfig(**fields)
    return MultiTokenLM.from_config(base_config(config, byte_tokenizer()), multi_token_config(config))


def test_a_paper_size_is_its_row_of_table_s14():
    shape, wanted = shape_of(size="3M", sequence_length=256), paper_config("3M")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps"):
        assert getattr(shape, name) == getattr(wanted, name), name
    assert shape.vocab_size == 258
    assert (shape.eos_token_id, shape.pad_token_id) == (256, 257)
    assert shape.max_position_embeddings == 4 * 256


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_every_family_trains_what_the_fields_say(family):
    model = build(
        family=family, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=40,
        num_future_tokens=2, tie_embeddings=True, max_positions=300,
    )  # fmt: skip
    assert model.config.model_type == family
    assert model.config.max_position_embeddings == 300
    assert getattr(model.config, "sliding_window", None) is None
    assert (len(model.family.layers), len(model.heads)) == (3, 1)
    layer = model.family.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (16, 32)
    assert layer.mlp.gate_proj.weight.shape == (40, 32)
    assert model.family.lm_head.weight is model.get_input_embeddings().weight


def test_a_base_config_folder_gives_the_shape_and_the_tokenizer_the_special_ids(tmp_path):
    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2
    ).save_pretrained(tmp_path)
    model = build(base_config=str(tmp_path), num_future_tokens=3)
    assert model.config.num_hidden_layers == 3
    assert model.config.vocab_size == 300
    assert model.config.eos_token_id == 256


def test_a_base_config_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"base_config=.*cannot be read"):
        shape_of(base_config=str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ConfigError, match=r"base_config=.*cannot be read"):
        shape_of(base_config=str(tmp_path))
    LlamaConfig(vocab_size=200, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size=200, tokenizer=bytes needs 258"):
        shape_of(base_config=str(tmp_path))
    LlamaConfig(vocab_size=300, max_position_embeddings=64, hidden_size=32, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match=r"allows 64 positions, sequence_length=256"):
        shape_of(base_config=str(tmp_path))


def test_an_unknown_size_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown size '10m'; .*10M"):
        shape_of(size="10m")


@pytest.mark.parametrize("tied", [False, True])
def test_scaled_initialization_follows_inputs_and_depth(tied):
    torch.manual_seed(0)
    model = build(hidden_size=128, num_layers=6, num_heads=2, num_future_tokens=3, tie_embeddings=tied)
    scaled_initialization(model)
    depth = 4
    for layer in (*model.family.layers, *model.heads):
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.6 / 128**0.5, rel=0.05)
        assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.6 / (128 * 2 * depth) ** 0.5, rel=0.05)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.6 / (352 * 2 * depth) ** 0.5, rel=0.05)
        assert torch.equal(layer.input_layernorm.weight, torch.ones(128))
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.1, rel=0.05)
    unembedding = model.family.lm_head.weight
    assert (unembedding is model.get_input_embeddings().weight) == tied
    if not tied:
        assert unembedding.std().item() == pytest.approx(0.02, rel=0.05)
