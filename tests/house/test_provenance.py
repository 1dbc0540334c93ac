"""A record says what made a result, and nothing about whose machine it was."""

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headway.provenance import package_versions, provenance


def test_record_is_json_with_versions_date_and_machine():
    record = json.loads(json.dumps(provenance()))
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"]
    assert record["date"].endswith("+00:00")
    assert record["machine"]["cores"] >= 1


def test_record_is_made_without_importing_torch():
    script = "import sys; from headway.provenance import provenance; provenance(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("train", "train"),
        ("--steps=10", "--steps=10"),
        ("{root}elsewhere{sep}model", "model"),
        ("--output={root}elsewhere{sep}model", "--output=model"),
        ("{here}{sep}out{sep}model", "out{sep}model"),
        ("a prompt about {root}", "a prompt about {root}"),
    ],
)
def test_arguments_keep_no_absolute_path(argument: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = {"root": Path.cwd().anchor, "sep": os.sep, "here": str(Path.cwd())}
    argv = [str(tmp_path / "bin" / "headway"), argument.format(**names)]
    assert provenance(argv)["argv"] == ["headway", kept.format(**names)]


def test_record_names_neither_host_nor_home():
    text = json.dumps(provenance([str(Path.home() / "bin" / "headway"), str(Path.home() / "model")]))
    assert str(Path.home()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_threads_are_those_that_torch_uses(monkeypatch: pytest.MonkeyPatch):
    class Loaded:
        @staticmethod
        def get_num_threads() -> int:
            return 7

    monkeypatch.setitem(sys.modules, "torch", Loaded)
    assert provenance()["machine"]["threads"] == 7


def test_absent_package_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("headway.provenance._PACKAGES", ("headway", "no-such-package-of-headway"))
    versions = package_versions()
    assert versions["headway"]
    assert versions["no-such-package-of-headway"] is None


def test_commit_is_that_of_the_checkout_or_absent():
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = head.stdout.strip() if head.returncode == 0 else None
    assert provenance()["commit"] == expected
