"""A llama model goes to the authors' layout and back without losing a bit, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import meta_llama
from headway.convert.convert import convert
from headway.convert.facebook.params import feed_forward_rule, feed_forward_width
from headway.convert.facebook.tensors import to_half_split, to_interleaved
from headway.errors import CheckpointError, IncompatibleModelError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 20)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | {
        f"heads.{name}": tensor for name, tensor in load_file(folder / "mtp" / "heads.safetensors").items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [
        name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_facebook_to_headway_to_facebook_is_bit_exact(kv_heads, dtype, tmp_path):
    state = meta_llama.write_folder(tmp_path / "a", n_kv_heads=kv_heads, dtype=dtype)
    convert(tmp_path / "a", tmp_path / "b", source_format="facebook", target_format="headway", verify=True)
    convert(tmp_path / "b", tmp_path / "c", source_format="headway", target_format="facebook", verify=True)
    assert_equal(torch.load(tmp_path / "c" / "consolidated.00.pth", weights_only=True), state)
    before, after = (json.loads((tmp_path / name / "params.json").read_text()) for name in "ac")
    # Several multiples give one width; the smallest of them was lost, the width was not.
    assert meta_llama.hidden_width(after) == meta_llama.hidden_width(before)
    assert {name: after[name] for name in before if name != "multiple_of"} == {
        name: value for name, value in before.items() if name != "multiple_of"
    }


def test_headway_to_facebook_to_headway_is_bit_exact_and_keeps_what_params_cannot_say(tmp_path):
    model = tiny_model(num_future_tokens=3, offset_weights=(1.0, 0.5, 0.25), loss_chunk_tokens=7)
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")
    convert(tmp_path / "b", tmp_path / "c", source_format="facebook", target_format="headway")
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    again = MultiTokenLM.from_pretrained(tmp_path / "c")
    assert again.mtp_config == model.mtp_config
    for name in ("max_position_embeddings", "eos_token_id", "bos_token_id", "initializer_range", "rope_parameters"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert json.loads((tmp_path / "c" / "mtp" / "config.json").read_text())["base"]["name"] == "a"


def test_the_exported_file_gives_the_models_logits_in_an_independent_forward(tmp_path):
    model = tiny_model("llama-gqa-tied")
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")
    state = torch.load(tmp_path / "b" / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "b" / "params.json").read_text())
    with torch.no_grad():
        expected = model(TOKENS, return_future_logits=True).future_logits
    torch.testing.assert_close(meta_llama.forward(state, params, TOKENS), expected, rtol=0, atol=2e-5)
    assert meta_llama.hidden_width(params) == model.config.intermediate_size
    # Tying has no place in the layout: the matrix is written out, and the report says so.
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    assert any("tied" in note for note in report.notes)
    assert "max_seq_len" not in params  # Meta's loader passes it itself and fails on a second one


@pytest.mark.parametrize(
    "family", ["llama-rope-scaled", "qwen2", "qwen3", "gemma2", "mistral-sliding", "olmo2", "phi3", "gpt2"]
)
def test_what_the_layout_cannot_hold_is_refused_with_the_nearest_alternative(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleModelError, match="--to headway"):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 16}, "dim / n_heads wide"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_llama_models_that_are_not_metas_block_are_refused(changes, reason, tmp_path):
    attach_heads(tiny_base("llama", **changes), MultiTokenConfig(num_future_tokens=2)).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleModelError, match=reason):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")


def test_a_plain_llama_becomes_a_folder_with_one_future_token(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="facebook", verify=True)
    convert(tmp_path / "b", tmp_path / "c", source_format="facebook", target_format="hf", verify=True)
    assert json.loads((tmp_path / "b" / "params.json").read_text())["n_future_tokens"] == 1
    assert_equal(load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors"))


def test_a_sidecar_of_another_model_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")
    path = tmp_path / "b" / "headway.json"
    record = json.loads(path.read_text())
    record["multi_token"]["num_future_tokens"] = 2
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"params\.json says 4"):
        convert(tmp_path / "b", tmp_path / "c", source_format="facebook", target_format="headway")
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="restore or delete"):
        convert(tmp_path / "b", tmp_path / "c", source_format="facebook", target_format="headway")


@given(dim=st.integers(2, 20000), width=st.integers(1, 60000))
def test_every_feed_forward_width_has_a_rule_that_gives_exactly_it(dim, width):
    assert feed_forward_width(dim, *feed_forward_rule(dim, width)) == width


def test_the_rule_of_the_released_models_is_found_again():
    assert feed_forward_rule(4096, 11008) == (256, None)


@given(heads=st.integers(1, 6), pairs=st.integers(1, 6), width=st.integers(1, 5))
def test_reordering_rows_keeps_heads_apart_and_is_undone(heads, pairs, width):
    rows = heads * pairs * 2
    weight = torch.arange(rows * width).view(rows, width)
    split = to_half_split(weight, num_heads=heads)
    assert torch.equal(to_interleaved(split, num_heads=heads), weight)
    for head in range(heads):
        for pair in range(pairs):
            first = head * 2 * pairs
            assert torch.equal(split[first + pair], weight[first + 2 * pair])
            assert torch.equal(split[first + pairs + pair], weight[first + 2 * pair + 1])
