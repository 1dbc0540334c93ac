"""Files of torch.save: no code runs on reading, and what is written is what torch itself would read."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from headway.convert.lazy_model import LazyTensor
from headway.convert.torch_files import open_torch_file, write_torch_file
from headway.errors import CheckpointError

TENSORS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(3, 4, 2).to(torch.bfloat16),
    "float16": torch.randn(9).half(),
    "double": torch.randn(3, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_torch_file(path, {name: lazy(tensor) for name, tensor in tensors.items()})
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_was_written(mmap, tmp_path):
    path = written(tmp_path / "consolidated.00.pth", TENSORS)
    again = torch.load(path, weights_only=True, mmap=mmap)
    assert again.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
        assert again[name].is_contiguous()


def test_the_archive_is_sound_and_values_are_aligned(tmp_path):
    path = written(tmp_path / "x.pth", TENSORS)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums: other programs read the file as the zip archive that it is
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values() if tensor.numel()} == {0}


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path):
    tensor = torch.randn(4, 6).t()
    assert torch.equal(torch.load(written(tmp_path / "x.pth", {"a": tensor}))["a"], tensor)


def test_what_torch_wrote_is_read_with_shape_and_dtype_known_beforehand(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    found = open_torch_file(tmp_path / "x.pth")
    for name, tensor in TENSORS.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found[name].read(), tensor)


class Command:
    """A pickle that leaves a file behind when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(legacy, tmp_path):
    trace = tmp_path / "ran"
    torch.save(
        {"weight": torch.zeros(2), "extra": Command(trace)},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CheckpointError) as caught:
        open_torch_file(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert legacy or "can run code" in str(caught.value)
    assert not trace.exists()


def test_a_bare_pickle_and_other_contents_are_refused(tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, match in (("bare", "cannot be read"), ("nested", "got dict with model"), ("list", "got list")):
        with pytest.raises(CheckpointError, match=match):
            open_torch_file(tmp_path / f"{name}.pth")


def test_a_tensor_that_is_not_what_was_announced_is_a_mistake(tmp_path):
    wrong = LazyTensor((2, 2), torch.float32, lambda: torch.zeros(4))
    with pytest.raises(ValueError, match="announced"):
        write_torch_file(tmp_path / "x.pth", {"a": wrong})
