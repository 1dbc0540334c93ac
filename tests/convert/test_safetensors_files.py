"""Safetensors files written tensor by tensor are those that the library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headway.convert.lazy_model import LazyTensor
from headway.convert.safetensors_files import open_checkpoint, open_safetensors, write_checkpoint, write_safetensors
from headway.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    seed=st.integers(0, 9),
)
def test_the_library_reads_back_every_mixture_of_shapes_and_types(shapes, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(-9 if dtype != torch.uint8 else 0, 9, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, lazy(tensors))
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in tensors.items())
    ours = open_safetensors(path)
    assert all(torch.equal(ours[n].read(), t) for n, t in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_everything_once_and_stay_below_the_limit(tmp_path):
    tensors = {f"w{i}": torch.randn(10, 10) for i in range(7)} | {"big": torch.randn(40, 40)}
    told = []
    write_checkpoint(
        tmp_path, lazy(tensors), always_index=False, max_shard_bytes=1000, written=lambda name, _: told.append(name)
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == 7 * 400 + 6400
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(tmp_path / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(tensor.nbytes for tensor in held.values()) <= 1000 or set(held) == {"big"}
    assert told == sorted(tensors)
    assert all(torch.equal(tensor.read(), tensors[name]) for name, tensor in open_checkpoint(tmp_path).items())


def damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def escaping_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def forgetful_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damaged_index, "damaged"),
        (escaping_index, "not a file beside it"),
        (forgetful_index, "disagree about 1 tensors"),
        (missing_shard, "half written"),
        (truncated, "cannot be read"),
        (pickled, "a pickle: load it with transformers"),
    ],
)
def test_every_damage_is_one_clear_error(damage, match, tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_quantised_types_are_refused_by_name(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        open_checkpoint(tmp_path)


def test_an_existing_file_is_never_written_over(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x", {})
