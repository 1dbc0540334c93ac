"""A model folder is replaced as a whole or not at all, and a base is recognised tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from headway.errors import CheckpointError
from headway.model.fingerprint import FingerprintBuilder, base_fingerprint, same_fingerprint, untied_tensors
from headway.model.folder import write_folder
from tiny_models import tiny_base


def write(**files: str):
    def fill(folder) -> None:
        for name, text in files.items():
            (folder / f"{name}.json").write_text(text)

    return fill


def test_what_the_old_model_leaves_behind_goes_when_it_is_replaced(tmp_path):
    target = tmp_path / "m"
    (target / "mtp").mkdir(parents=True)
    for name in ("params.json", "consolidated.00.pth", "consolidated.01.pth", "mtp/config.json", "notes.txt"):
        (target / name).write_text("old")
    patterns = ("params.json", "consolidated.*.pth", "mtp/config.json")
    write_folder(target, write(config="new"), overwrite=True, replaces=("params.json",), removes=patterns)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "notes.txt"]


def test_without_the_wish_to_overwrite_nothing_is_removed(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "params.json").write_text("old")
    with pytest.raises(CheckpointError, match="overwrite"):
        write_folder(target, write(config="new"), overwrite=False, replaces=("params.json",), removes=("*",))
    assert [path.name for path in target.iterdir()] == ["params.json"]


@pytest.mark.parametrize("marker", ["config", "params"])
def test_the_file_that_makes_a_folder_a_model_is_moved_in_last(tmp_path, monkeypatch, marker):
    target = tmp_path / "m"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    moved = []
    replace = type(target).replace

    def watch(self, to):
        moved.append(self.name)
        return replace(self, to)

    monkeypatch.setattr(type(target), "replace", watch)
    write_folder(target, write(**{marker: "a", "zzz": "b"}), overwrite=False, replaces=())
    assert moved == ["zzz.json", f"{marker}.json"]


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gpt2", "gpt_neox"])
def test_a_fingerprint_taken_tensor_by_tensor_is_that_of_the_whole_base(family):
    base = tiny_base(family, dtype=torch.float16)
    tensors = untied_tensors(base, base.state_dict())
    builder = FingerprintBuilder()
    for name in sorted(tensors):
        builder.add(name, tensors[name])
    assert builder.fingerprint() == base_fingerprint(base, base.state_dict())


def test_a_fingerprint_knows_the_same_base_in_another_precision_and_no_other():
    exact, rounded = tiny_base("llama"), tiny_base("llama").to(torch.bfloat16)
    other = tiny_base("llama", seed=1)
    prints = [base_fingerprint(base, base.state_dict()) for base in (exact, rounded, other)]
    assert same_fingerprint(prints[0], prints[1])
    assert not same_fingerprint(prints[0], prints[2])
    assert not same_fingerprint(prints[1], prints[2])


def test_tensors_out_of_order_are_refused():
    builder = FingerprintBuilder()
    builder.add("b", torch.zeros(1))
    with pytest.raises(ValueError, match="order"):
        builder.add("a", torch.zeros(1))
