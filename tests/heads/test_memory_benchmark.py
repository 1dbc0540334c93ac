"""`benchmarks/head_memory.py` goes on where it was stopped, and only under the same setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def measured(monkeypatch):
    """The cells that were measured, without measuring any."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import head_memory

    cells = []

    def in_process(*arguments):
        cells.append(arguments[1:])
        return {"step_mib": float(len(cells)), "state_mib": 1.0}

    monkeypatch.setattr(head_memory, "in_process", in_process)

    def run(*arguments):
        cells.clear()
        monkeypatch.setattr(sys, "argv", ["head_memory.py", *arguments])
        head_memory.main()
        return list(cells)

    return run


def test_cells_of_an_earlier_document_are_not_measured_again(measured, tmp_path, capsys):
    output = tmp_path / "memory.json"
    common = ("--output", str(output), "--repeats", "1", "--no-bytes", "--offsets", "1", "--offsets", "32")
    assert measured(*common, "--heads", "linear") == [("linear", "1"), ("linear", "32")]
    assert measured(*common, "--heads", "linear", "--heads", "hydra, shared unembedding") == [
        ("hydra, shared unembedding", "1"),
        ("hydra, shared unembedding", "32"),
    ]
    document = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert document["step_n32_over_n1"] == {"linear": 2.0, "hydra, shared unembedding": 2.0}
    other = [argument if argument != "1" else "2" for argument in common[:4]]
    assert len(measured(*other, *common[4:], "--heads", "linear")) == 4  # two processes per cell: all anew
