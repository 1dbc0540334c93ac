"""Plain checkpoints and headway folders of every family go into each other without losing a bit or hiding a loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headway.convert import safetensors_files
from headway.convert.convert import convert
from headway.convert.formats import EXPORT_FORMATS, MODEL_FORMATS
from headway.convert.names import EXPORTS, FORMATS
from headway.errors import CheckpointError, ConfigError, IncompatibleModelError
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 12)


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


def test_every_name_has_its_code():
    assert list(FORMATS) == list(MODEL_FORMATS)
    assert list(EXPORTS) == list(EXPORT_FORMATS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_export_has_no_trace_of_heads_and_equals_the_base(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf", verify=True)
    assert report.num_future_tokens == 1
    assert report.num_head_tensors == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (
        load_file(tmp_path / "b" / "model.safetensors").keys() == load_file(tmp_path / "a" / "model.safetensors").keys()
    )
    written, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ba")
    assert written == saved
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, model.base(TOKENS).logits)
    assert report.notes == ("heads left behind: 3",)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_headway_folder_is_rewritten_so_that_the_library_accepts_it(family, tmp_path):
    model = tiny_model(family, offset_weights=(1.0, 0.5, 0.25, 0.125))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="headway", verify=True)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert torch.equal(all_logits(again), all_logits(model))
    assert again.mtp_config == model.mtp_config
    records = [json.loads((tmp_path / name / "mtp" / "config.json").read_text()) for name in "ab"]
    assert records[0]["base"]["fingerprint"] == records[1]["base"]["fingerprint"]
    assert records[0]["num_tensors"] == records[1]["num_tensors"]


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gpt_neox", "gpt2"])
def test_shards_are_written_and_read(family, tmp_path, monkeypatch):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 30_000)
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="headway")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "b")), all_logits(model))


def test_dtype_rounds_weights_once_and_the_folder_still_knows_its_base(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    report = convert(
        tmp_path / "a",
        tmp_path / "b",
        source_format="headway",
        target_format="headway",
        dtype=torch.bfloat16,
        verify=True,
    )
    assert report.dtype == "bfloat16"
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    expected = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_mixed_precisions_stay_mixed(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    model.heads.float()
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="headway", verify=True)
    assert report.dtype == "bfloat16,float32"
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert {parameter.dtype for parameter in again.heads.parameters()} == {torch.float32}
    # A base of two types is not written in the order of its fingerprint.
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "a", tmp_path / "c", source_format="headway", target_format="headway", verify=True)
    MultiTokenLM.from_pretrained(tmp_path / "c")


def test_heads_alone_are_joined_with_their_base_and_no_other(tmp_path):
    model = tiny_model()
    model.base.save_pretrained(tmp_path / "base")
    model.save_heads(tmp_path / "heads")
    options = {"source_format": "headway", "target_format": "headway"}
    with pytest.raises(CheckpointError, match="--base"):
        convert(tmp_path / "heads", tmp_path / "whole", **options)
    convert(tmp_path / "heads", tmp_path / "whole", base=tmp_path / "base", verify=True, **options)
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "whole")), all_logits(model))
    tiny_base("llama", seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="belong to another base"):
        convert(tmp_path / "heads", tmp_path / "wrong", base=tmp_path / "other", **options)
    with pytest.raises(CheckpointError, match="holds its base"):
        convert(tmp_path / "whole", tmp_path / "wrong", base=tmp_path / "base", **options)
    assert not (tmp_path / "wrong").exists()


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_buffers_of_older_versions_are_left_out_and_named(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    report = convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf")
    assert report.left_out == ("model.layers.0.self_attn.rotary_emb.inv_freq: the model computes it",)


def test_checkpoints_of_the_decoder_alone_and_tied_repetitions_are_understood(tmp_path):
    base = tiny_base("gpt2")
    base.save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: {name.removeprefix("transformer."): value for name, value in t.items()})
    rewrite(tmp_path / "a", lambda t: t | {"lm_head.weight": t["wte.weight"].clone(), "h.0.attn.bias": torch.ones(1)})
    report = convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf", verify=True)
    assert len(report.left_out) == 2
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert torch.equal(again(TOKENS).logits, base(TOKENS).logits)
    rewrite(tmp_path / "a", lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(tmp_path / "a", tmp_path / "c", source_format="hf", target_format="hf")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t | {"mtp.0.weight": torch.ones(1)}, "1 tensors that the model has no place for: mtp.0.weight"),
        (lambda t: {n: v for n, v in t.items() if "up_proj" not in n}, "3 tensors missing: model.layers.0.mlp.up_proj"),
        (lambda t: t | {"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\) and must be \(32,\)"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(change, match, tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf")
    assert not (tmp_path / "b").exists()


def test_damaged_heads_are_never_converted(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    heads = tmp_path / "a" / "mtp" / "heads.safetensors"
    tensors = load_file(heads)
    tensors["0.mlp.up_proj.weight"] += 1
    save_file(tensors, heads, {"format": "pt"})
    for target in ("headway", "hf", "facebook"):
        with pytest.raises(CheckpointError, match="checksum"):
            convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target)


def test_a_folder_with_heads_is_not_read_as_a_plain_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="--from headway"):
        convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf")


def test_a_wrong_format_is_answered_with_the_right_one(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="it looks like --from hf"):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf")
    with pytest.raises(CheckpointError, match="no model folder"):
        convert(tmp_path / "nowhere", tmp_path / "b", source_format="hf", target_format="hf")
    with pytest.raises(ConfigError, match="the formats are headway, hf, facebook"):
        convert(tmp_path / "a", tmp_path / "b", source_format="onnx", target_format="hf")


def test_a_family_that_heads_cannot_follow_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(IncompatibleModelError, match="families that work"):
        convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="headway", num_future_tokens=2)


def test_the_name_of_the_base_survives(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"_name_or_path": "people/model-7b"}))
    convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="headway", num_future_tokens=2)
    report = convert(tmp_path / "b", tmp_path / "c", source_format="headway", target_format="facebook")
    assert report.base_name == "people/model-7b"
    report = convert(tmp_path / "c", tmp_path / "d", source_format="facebook", target_format="headway")
    assert report.base_name == "people/model-7b"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"_name_or_path": str(tmp_path / "secret")}))
    shutil.rmtree(tmp_path / "b")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="headway", num_future_tokens=2)
    assert report.base_name == "a"
