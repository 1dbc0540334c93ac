"""Heads cannot get lost: every save round-trips or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headway.errors import CheckpointError
from headway.model import folder as folder_module
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 12)


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_reloading_gives_bit_equal_logits_at_every_offset_and_a_plain_base(family, tmp_path):
    model = tiny_model(family, offset_weights=(1.0, 0.5, 0.25, 0.125))
    model.save_pretrained(tmp_path / "m")
    again = MultiTokenLM.from_pretrained(tmp_path / "m")
    assert torch.equal(all_logits(again), all_logits(model))
    assert again.mtp_config == model.mtp_config
    assert not again.training
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, model.base(TOKENS).logits)


def test_the_top_of_the_folder_is_a_plain_checkpoint_with_an_index(saved):
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert set(index["weight_map"]) == set(load_file(saved / "model.safetensors"))
    assert sorted(path.name for path in (saved / "mtp").iterdir()) == ["config.json", "heads.safetensors"]
    config = (saved / "config.json").read_text()
    assert "mtp" not in config
    assert "headway" not in config
    assert str(saved) not in (saved / "mtp" / "config.json").read_text()
    assert not list(saved.rglob("*.bin"))


def test_sharded_bases_round_trip(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), all_logits(model))


def test_other_precisions_load_and_heads_keep_theirs(saved, tmp_path):
    half = MultiTokenLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    mixed = tiny_model(dtype=torch.bfloat16)
    mixed.heads.float()
    mixed.save_pretrained(tmp_path / "mixed")
    again = MultiTokenLM.from_pretrained(tmp_path / "mixed")
    assert {p.dtype for p in again.heads.parameters()} == {torch.float32}
    assert {p.dtype for p in again.base.parameters()} == {torch.bfloat16}


def test_weights_stored_in_half_that_ask_for_float32_load_whole_in_float32(tmp_path):
    half = tiny_model(dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    again = MultiTokenLM.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor.float(), again.state_dict()[name])


def test_heads_alone_round_trip_on_their_base_and_refuse_another(tmp_path):
    base = tiny_base("llama")
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=3, head_init="fresh"))
    model.save_heads(tmp_path / "heads")
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["mtp"]
    again = MultiTokenLM.from_pretrained(tmp_path / "heads", base=tiny_base("llama"))
    assert torch.equal(all_logits(again), all_logits(model))
    other = tiny_base("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 2] += 1e-3
    with pytest.raises(CheckpointError, match="another base"):
        MultiTokenLM.from_pretrained(tmp_path / "heads", base=other)


def test_heads_alone_find_their_base_by_the_name_they_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_base("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained("base")
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=3, head_init="fresh"))
    model.save_heads(tmp_path / "heads")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained("heads")), all_logits(model))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base"):
        MultiTokenLM.from_pretrained("heads", local_files_only=True)


def test_a_changed_base_in_a_whole_folder_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="another base"):
        MultiTokenLM.from_pretrained(copy)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, {"format": "pt"})


def edit_config(**changes):
    def edit(path: Path) -> None:
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | changes))

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("mtp/heads.safetensors", truncate, "truncated"),
        ("mtp/heads.safetensors", Path.unlink, "half written"),
        ("mtp/config.json", Path.unlink, "half written"),
        ("mtp/config.json", truncate, "damaged"),
        ("mtp/config.json", lambda path: path.write_bytes(b"\xff\xfe"), "damaged"),
        ("mtp/config.json", edit_config(format_version=99), "format version 99"),
        ("mtp/config.json", edit_config(multi_token={"num_future_tokens": 5}), "do not fit"),
        ("mtp/config.json", edit_config(multi_token={"num_future_tokens": 0}), "damaged"),
        ("mtp/config.json", edit_config(multi_token=[]), "damaged"),
        ("mtp/config.json", edit_config(base=[]), "damaged"),
        ("model.safetensors", truncate, "cannot be loaded"),
        ("model.safetensors", Path.unlink, "half written"),
        ("model.safetensors", drop_tensor, "missing"),
        ("config.json", Path.unlink, "half written"),
        ("config.json", truncate, "cannot be loaded"),
        ("model.safetensors.index.json", truncate, "damaged"),
    ],
)
def test_every_damage_is_one_clear_error(copy, name, damage, match):
    damage(copy / name)
    with pytest.raises(CheckpointError, match=match) as caught:
        MultiTokenLM.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_a_plain_checkpoint_and_a_missing_folder_say_what_to_do(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="attach_heads"):
        MultiTokenLM.from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no model folder"):
        MultiTokenLM.from_pretrained(tmp_path / "nowhere")


def test_nothing_existing_is_overwritten_unless_asked(tmp_path):
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    first.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="overwrite"):
        second.save_pretrained(tmp_path / "m")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), all_logits(first))
    second.save_pretrained(tmp_path / "m", overwrite=True, max_shard_size="40KB")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), all_logits(second))
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_a_save_that_breaks_off_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    model = tiny_model()

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("headway.model.checkpoint.save_file", disk_full)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "m")
    moves = []
    original = Path.replace

    def third_move_fails(self, target):
        moves.append(self)
        if len(moves) == 3:
            disk_full()
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.Path, "replace", third_move_fails)
        with pytest.raises(CheckpointError):
            model.save_pretrained(tmp_path / "m", overwrite=True)
    with pytest.raises(CheckpointError):
        MultiTokenLM.from_pretrained(tmp_path / "m")
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_the_trainers_way_of_saving_writes_the_given_state_dict(tmp_path):
    model = tiny_model("llama-gqa-tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = all_logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    # The fingerprint is the saved base's, not the live one's.
    model.save_pretrained(tmp_path / "m", state_dict=state)
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), expected)
    state.pop("heads.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        model.save_pretrained(tmp_path / "n", state_dict=state)
