"""A plain folder is ready for llama.cpp's converter, or the report says why it is not."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from head_cases import head_model
from headway.convert.convert import convert
from headway.data.tokenizers import byte_tokenizer
from tiny_models import tiny_base, tiny_model

TO_HF = {"source_format": "headway", "target_format": "hf"}


def bpe_tokenizer(size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("name", ["transformer", "anticausal", "medusa", "sequential"])
def test_the_plain_export_of_every_kind_of_heads_is_ready(name, tmp_path):
    head_model(name, num_future_tokens=2).save_pretrained(tmp_path / "a")
    bpe_tokenizer(30).save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", verify=True, **TO_HF)
    assert report.gguf_obstacles == ()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= report.files.keys()
    assert not [name for name in report.files if "mtp" in name or name == "headway.json"]


def test_what_stands_against_it_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    assert (
        "neither tokenizer.model nor tokenizer.json"
        in convert(tmp_path / "a", tmp_path / "none", **TO_HF).gguf_obstacles[0]
    )
    byte_tokenizer().save_pretrained(tmp_path / "a")
    found = convert(tmp_path / "a", tmp_path / "bytes", **TO_HF).gguf_obstacles
    assert [any(words in reason for reason in found) for words in ("no merges", "ids up to 257")] == [True, True]
    bpe_tokenizer(30).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    (reason,) = convert(tmp_path / "a", tmp_path / "config", **TO_HF).gguf_obstacles
    assert "tokenizer_config.json" in reason
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"x")
    assert convert(tmp_path / "a", tmp_path / "pieces", **TO_HF).gguf_obstacles == ()
    assert (
        convert(tmp_path / "a", tmp_path / "hw", source_format="headway", target_format="headway").gguf_obstacles
        is None
    )


def test_a_rope_that_llama_cpp_has_not_is_named(tmp_path):
    base = tiny_base("llama")
    base.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base.save_pretrained(tmp_path / "a")
    bpe_tokenizer(30).save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf")
    assert report.gguf_obstacles == ("llama.cpp has no rope scaling of type 'dynamic'",)
