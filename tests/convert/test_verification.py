"""A conversion that is wrong, broken off or full disks leave nothing that looks like a model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import meta_llama
from accidents import ACCIDENTS
from headway.convert import headway_folder, plain_folder, safetensors_files
from headway.convert.convert import convert
from headway.convert.facebook import folder as facebook_folder
from headway.convert.facebook import tensors as facebook_tensors
from headway.errors import CheckpointError, ConfigError
from tiny_models import tiny_base, tiny_model

IMPORT = {"source_format": "facebook", "target_format": "headway"}


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_verification_catches_rows_in_the_wrong_order(spread, tmp_path, monkeypatch):
    state = meta_llama.write_folder(tmp_path / "a")
    # Weak weights leave logits near zero, strong ones saturate attention: the limit follows the model.
    for tensor in state.values():
        if tensor.ndim == 2:
            tensor.mul_(spread / 0.2)
    torch.save(state, tmp_path / "a" / "consolidated.00.pth")
    report = convert(tmp_path / "a", tmp_path / "right", verify=True, **IMPORT).verification
    assert max(report.max_abs_difference) < report.limit < 1e-3 * report.max_abs_logit
    shutil.rmtree(tmp_path / "right")
    monkeypatch.setattr(facebook_folder, "from_meta", lambda name, tensor, params: tensor)
    with pytest.raises(CheckpointError, match="logits of offset 1"):
        convert(tmp_path / "a", tmp_path / "b", verify=True, **IMPORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_verification_catches_heads_that_changed_places(tmp_path, monkeypatch):
    meta_llama.write_folder(tmp_path / "a")
    original = facebook_tensors.meta_name_of_head

    def swapped(name: str) -> str:
        index, _, rest = name.partition(".")
        return original(f"{ {'0': '1', '1': '0'}.get(index, index) }.{rest}")

    monkeypatch.setattr(facebook_folder, "meta_name_of_head", swapped)
    with pytest.raises(CheckpointError, match="logits of offset 2"):
        convert(tmp_path / "a", tmp_path / "b", verify=True, **IMPORT)


def test_verification_catches_a_disk_that_changed_a_bit(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "a")
    original = safetensors_files.raw_bytes

    def flipped(tensor: torch.Tensor) -> memoryview:
        data = bytearray(original(tensor))
        data[-1] ^= 1
        return memoryview(bytes(data))

    monkeypatch.setattr(safetensors_files, "raw_bytes", flipped)
    with pytest.raises(CheckpointError):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_untrained_copies_are_named_and_trained_heads_are_not(tmp_path):
    model = tiny_model(num_future_tokens=4)
    model.heads[1].load_state_dict(model.family.last_layer.state_dict())
    with torch.no_grad():
        model.heads[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "a")
    report = convert(
        tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook", verify=True
    ).verification
    assert report.random == ()
    assert {name.partition(".")[0] for name in report.unchanged} == {"1"}
    assert "1.mlp.up_proj.weight" not in report.unchanged
    assert len(report.unchanged) == 8
    assert report.missing == ()
    assert report.tensors_compared == 30 + 27
    assert len(report.max_abs_difference) == 4
    assert max(report.max_abs_difference) <= 1e-5 < report.limit


@pytest.mark.parametrize(
    ("module", "name", "target"),
    [
        (plain_folder, "write_checkpoint", "hf"),
        (plain_folder, "write_checkpoint", "headway"),
        (headway_folder, "write_safetensors", "headway"),
        (headway_folder, "write_config", "headway"),
        (facebook_folder, "write_torch_file", "facebook"),
        (facebook_folder, "_write_sidecar", "facebook"),
    ],
)
@pytest.mark.parametrize(("accident", "error"), ACCIDENTS)
def test_a_conversion_that_breaks_off_leaves_nothing(module, name, target, accident, error, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "a")
    monkeypatch.setattr(module, name, accident)
    with pytest.raises(error):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_is_being_written_does_not_look_complete_before_its_last_file(tmp_path, monkeypatch):
    """A process that is killed cannot clean up: what it leaves must not pass for a model."""
    tiny_model().save_pretrained(tmp_path / "a")
    seen: dict[str, set[str]] = {}

    def spy(module, name: str, target: str, position: int) -> None:
        original = getattr(module, name)

        def watched(*args, **kwargs):
            folder = Path(args[position])
            seen[target] = {path.name for path in (folder if folder.is_dir() else folder.parent).iterdir()}
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    spy(headway_folder, "write_config", "headway", 1)
    spy(facebook_folder, "_write_sidecar", "facebook", 1)
    for target in ("headway", "facebook"):
        convert(tmp_path / "a", tmp_path / target, source_format="headway", target_format=target)
    assert "config.json" not in seen["headway"]
    assert "params.json" not in seen["facebook"]


def test_nothing_is_overwritten_unless_asked_and_then_nothing_old_survives(tmp_path):
    state = meta_llama.write_folder(tmp_path / "a", n_kv_heads=4)
    target = tmp_path / "t"
    shutil.copytree(tmp_path / "a", target)
    meta_llama.write_ranks(target, state, 2)
    for name in ("tokenizer.model", "notes.txt"):
        (target / name).write_text("old")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(tmp_path / "a", target, **IMPORT)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    convert(tmp_path / "a", target, overwrite=True, verify=True, **IMPORT)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "mtp",
        "notes.txt",
    ]
    convert(tmp_path / "a", target, source_format="facebook", target_format="hf", overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    convert(tmp_path / "a", target, source_format="facebook", target_format="facebook", overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == [
        "consolidated.00.pth",
        "headway.json",
        "notes.txt",
        "params.json",
    ]


def test_a_folder_is_not_converted_onto_itself(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="one folder"):
        convert(tmp_path / "a", tmp_path / "a" / ".." / "a", source_format="hf", target_format="hf", overwrite=True)


def test_progress_counts_every_byte_once(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    told: list[tuple[int, int]] = []
    report = convert(
        tmp_path / "a",
        tmp_path / "b",
        source_format="headway",
        target_format="facebook",
        verify=True,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (report.num_bytes, report.num_bytes)
    assert len(told) == report.num_base_tensors + report.num_head_tensors
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_lazy_tensor_is_cast_only_where_it_is_a_number_with_a_point():
    tensor = meta_llama.random_state(meta_llama.DEFAULTS)["norm.weight"]
    lazy = facebook_folder.LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
    assert lazy.to(None) is lazy
    assert torch.equal(lazy.to(torch.float16).read(), tensor.half())
    counts = replace(lazy, dtype=torch.int64, read=lambda: tensor.long())
    assert counts.to(torch.float16) is counts
