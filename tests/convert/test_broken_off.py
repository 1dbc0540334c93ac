"""The other layouts broken off, killed or converted wrongly: nothing that looks like a model, never silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medusa_layouts
import released_modules
from accidents import ACCIDENTS
from head_cases import head_model
from headway.convert.convert import convert
from headway.convert.formats import MODEL_FORMATS
from headway.convert.medusa import engine, heads_folder
from headway.convert.medusa import folder as medusa_folder
from headway.convert.recognise import looks_like
from headway.convert.sequential import folder as sequential_folder
from headway.convert.sequential import tensors as sequential_tensors
from headway.errors import CheckpointError
from tiny_models import tiny_base

HEADS = {
    "hf": "transformer",
    "headway": "transformer",
    "facebook": "transformer",
    "medusa": "medusa",
    "medusa-engine": "medusa",
    "transformers-mtp": "sequential-own-norm",
}


@pytest.mark.parametrize(
    ("module", "name", "target"),
    [
        (medusa_folder, "write_torch_file", "medusa"),
        (medusa_folder, "write_sidecar", "medusa"),
        (engine, "write_safetensors", "medusa-engine"),
        (engine, "write_sidecar", "medusa-engine"),
        (sequential_folder, "write_checkpoint", "transformers-mtp"),
        (sequential_folder, "write_sidecar", "transformers-mtp"),
    ],
)
@pytest.mark.parametrize(("accident", "error"), ACCIDENTS)
def test_a_conversion_that_breaks_off_leaves_nothing(module, name, target, accident, error, tmp_path, monkeypatch):
    head_model(HEADS[target]).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(module, name, accident)
    with pytest.raises(error):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from headway.convert import safetensors_files, torch_files
from headway.convert.convert import convert
original = safetensors_files.raw_bytes
for job in sys.argv[1:]:
    source, destination, target = job.split("|")
    child = os.fork()
    if child == 0:
        calls = 0
        def dying(tensor):
            global calls
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(tensor)
        safetensors_files.raw_bytes = torch_files.raw_bytes = dying
        convert(source, destination, source_format="headway", target_format=target)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_looks_whole(tmp_path):
    for name in sorted(set(HEADS.values())):
        head_model(name).save_pretrained(tmp_path / name)
    jobs = [f"{tmp_path / name}|{tmp_path / f'to-{target}'}|{target}" for target, name in HEADS.items()]
    subprocess.run([sys.executable, "-c", KILLED, *jobs], check=True, timeout=240)
    remains = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(remains) == len(HEADS) == len(MODEL_FORMATS)
    for path in remains:
        assert any(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert looks_like(path) is None
    for target, name in HEADS.items():
        assert not (tmp_path / f"to-{target}").exists()
        convert(tmp_path / name, tmp_path / f"to-{target}", source_format="headway", target_format=target, verify=True)
        assert looks_like(tmp_path / f"to-{target}") == target


def test_verification_catches_a_concatenation_in_the_wrong_order(tmp_path, monkeypatch):
    released_modules.write_folder(tmp_path / "m", "deepseek")
    monkeypatch.setattr(sequential_tensors, "halves_swapped", lambda tensor: tensor)
    options = {"source_format": "transformers-mtp", "target_format": "headway"}
    with pytest.raises(CheckpointError, match="logits of offset 2"):
        convert(tmp_path / "m", tmp_path / "b", verify=True, **options)
    head_model("sequential-own-norm").save_pretrained(tmp_path / "a")
    back = {"source_format": "headway", "target_format": "transformers-mtp", "verify": True}
    with pytest.raises(CheckpointError, match=r"1 tensors? missing|3 changed"):
        convert(tmp_path / "a", tmp_path / "b", **back)
    monkeypatch.setattr(sequential_folder, "halves_swapped", lambda tensor: tensor)
    with pytest.raises(CheckpointError, match="logits of offset 2"):
        convert(tmp_path / "a", tmp_path / "b", **back)
    assert not (tmp_path / "b").exists()


def test_verification_catches_medusa_heads_that_changed_places(tmp_path, monkeypatch):
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    medusa_layouts.write_medusa(tmp_path / "m", medusa_layouts.trained_heads(base, 3))
    original = heads_folder.MedusaTensors.to_heads

    def turned(self):
        return {f"{2 - int(name[0])}{name[1:]}": tensor for name, tensor in original(self).items()}

    monkeypatch.setattr(heads_folder.MedusaTensors, "to_heads", turned)
    with pytest.raises(CheckpointError, match="logits of offset 2"):
        convert(
            tmp_path / "m",
            tmp_path / "b",
            source_format="medusa",
            target_format="headway",
            base=tmp_path / "base",
            verify=True,
        )


def test_untrained_medusa_heads_are_named_in_every_layout(tmp_path):
    torch.manual_seed(0)
    tiny_base("llama").save_pretrained(tmp_path / "a")
    added = {"heads": "medusa", "num_future_tokens": 2, "verify": True}
    for target in ("medusa", "medusa-engine"):
        report = convert(tmp_path / "a", tmp_path / target, source_format="hf", target_format=target, **added)
        assert report.verification.unchanged == ("0.0.inner.weight", "unembeddings.0.weight")
        drawn = {"head_init": "fresh", **added}
        report = convert(tmp_path / "a", tmp_path / f"{target}-2", source_format="hf", target_format=target, **drawn)
        assert report.verification.random == ("unembeddings.0.weight",)


@pytest.mark.parametrize("target", ["medusa", "medusa-engine", "transformers-mtp"])
def test_what_travels_reaches_the_other_layouts_too(target, tmp_path):
    head_model(HEADS[target], num_future_tokens=2).save_pretrained(tmp_path / "a")
    for name in ("LICENSE", "README.md", "tokenizer_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    (tmp_path / "a" / "notes.bin").write_bytes(b"x")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target)
    assert report.companions == ("LICENSE", "README.md", "tokenizer_config.json")
    assert report.left_behind == ("notes.bin",)
    assert all((Path(tmp_path) / "b" / name).read_text() == "{}" for name in report.companions)
