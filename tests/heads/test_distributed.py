"""DDP and FSDP2 give the gradients of one process, for every head architecture."""

from __future__ import annotations

import json

import pytest
import torch.multiprocessing

import distributed_heads


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(distributed_heads.compare, args=(str(tmp_path),), nprocs=2)
    gaps = json.loads((tmp_path / "gaps.json").read_text(encoding="utf-8"))
    assert len(gaps) == len(distributed_heads.CASES) * len(distributed_heads.WRAPPERS)
    assert {case: gap for case, gap in gaps.items() if gap > 1e-12} == {}
