"""Tokenizer, licence and model card travel along; what does not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

import meta_llama
from headway.convert.convert import convert
from headway.convert.tokenizer import llama_tokenizer
from headway.data.tokenizers import byte_tokenizer, load_tokenizer
from headway.errors import CheckpointError
from tiny_models import tiny_base, tiny_model

SPACE = "\u2581"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "a"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "README.md", "NOTICE", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "training.log").write_text("x")
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    (folder / ".gitattributes").write_text("x")
    (folder / "original").mkdir()
    return folder


@pytest.mark.parametrize("target", ["headway", "hf", "facebook"])
def test_they_travel_into_every_format(target, source, tmp_path):
    report = convert(source, tmp_path / "b", source_format="headway", target_format=target)
    for name in ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "README.md", "NOTICE", "chat_template.jinja"):
        assert (tmp_path / "b" / name).read_text() == name
    tokenizer = load_tokenizer(tmp_path / "b")
    text = "caf\u00e9 au lait"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert report.left_behind == ("modeling_custom.py", "original/", "training.log")
    assert not (tmp_path / "b" / "modeling_custom.py").exists()
    assert set(report.companions) | set(report.left_behind) == {
        "original/" if path.is_dir() else path.name
        for path in source.iterdir()
        if path.name not in ("mtp", "config.json", "generation_config.json", ".gitattributes")
        and not path.name.startswith("model.safetensors")
    }


@pytest.mark.parametrize("target", ["headway", "hf", "facebook"])
def test_generation_settings_travel_and_damaged_ones_are_named(target, source, tmp_path):
    settings = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.7, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "b", source_format="headway", target_format=target)
    convert(tmp_path / "b", tmp_path / "c", source_format=target, target_format="hf")
    assert json.loads((tmp_path / "c" / "generation_config.json").read_text()) == settings
    (source / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="restore or delete"):
        convert(source, tmp_path / "d", source_format="headway", target_format=target)


def test_links_as_the_hubs_cache_has_them_become_files(source, tmp_path):
    licence = source / "LICENSE"
    (tmp_path / "blob").write_text("the licence")
    licence.unlink()
    licence.symlink_to(tmp_path / "blob")
    convert(source, tmp_path / "b", source_format="headway", target_format="hf")
    assert not (tmp_path / "b" / "LICENSE").is_symlink()
    assert (tmp_path / "b" / "LICENSE").read_text() == "the licence"


def test_weights_that_are_not_the_models_are_named(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "consolidated.safetensors").write_bytes(b"")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="hf", target_format="hf")
    assert report.left_behind == ("adapter_model.safetensors", "consolidated.safetensors")


def sentencepiece_model(path: Path, *, kind: int = 2) -> None:
    """A small model of Llama's kind: special tokens, bytes, pieces in the order in which merges made them."""
    module = import_protobuf()
    proto = module.ModelProto()
    proto.trainer_spec.model_type = kind
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(piece, 1) for piece in ("th", f"{SPACE}th", "he", f"{SPACE}the", "in", SPACE, *"abcdefghinrt")]
    for rank, (piece, type_) in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-float(rank), type=type_)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("target", ["headway", "hf"])
def test_a_sentencepiece_model_becomes_a_tokenizer_that_loads_without_sentencepiece(target, tmp_path):
    meta_llama.write_folder(tmp_path / "a")
    sentencepiece_model(tmp_path / "a" / "tokenizer.model")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="facebook", target_format=target)
    tokenizer = load_tokenizer(tmp_path / "b")
    ids = tokenizer("the cat \u00e9")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", f"{SPACE}the", SPACE, "c", "a", "t", SPACE, "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat \u00e9"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert "tokenizer.json was made from tokenizer.model" in report.notes
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()


def test_pieces_are_merged_in_the_order_of_their_ids(tmp_path):
    sentencepiece_model(tmp_path / "tokenizer.model")
    tokenizer = llama_tokenizer(tmp_path / "tokenizer.model")
    # "th" was learned before "he": "the" inside a word is th + e, never t + he.
    assert tokenizer.convert_ids_to_tokens(tokenizer("athe")["input_ids"])[1:] == [SPACE, "a", "th", "e"]


@pytest.mark.parametrize("content", [b"not a model", b"", None])
def test_a_tokenizer_of_another_kind_travels_and_the_report_says_what_is_missing(content, tmp_path):
    meta_llama.write_folder(tmp_path / "a")
    if content is None:
        sentencepiece_model(tmp_path / "a" / "tokenizer.model", kind=1)
    else:
        (tmp_path / "a" / "tokenizer.model").write_bytes(content)
    report = convert(tmp_path / "a", tmp_path / "b", source_format="facebook", target_format="headway")
    assert any("no tokenizer.json could be made" in note for note in report.notes)
    assert (tmp_path / "b" / "tokenizer.model").exists()
    assert not (tmp_path / "b" / "tokenizer.json").exists()
