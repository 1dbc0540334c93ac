"""What every file of the project keeps to: its size, its first line, and nothing of the machine it was written on."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 600
LONGEST_FIRST_LINE = 100
MOST_BYTES = 300_000
MOST_BYTES_OF_WEIGHTS = 25_000_000
WEIGHTS = ("reference/model/model.safetensors", "reference/model/mtp/heads.safetensors")

MACHINE_PATH = re.compile(r"(?<![\w.:/}])/(?:work|farm|tmp|root|opt|home|Users|mnt)/[\w.]+")
REGISTRY = re.compile(
    r"--(?:extra-)?index-url|--find-links|(?:PIP|UV)_[A-Z_]*INDEX|files\.pythonhosted\.org|download\.pytorch\.org"
    r"|https?://[^\s\"'<>)]+/simple\b"
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def lines_that_match(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_python_file_is_longer_than_two_ideas():
    counts = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("src", "tests", "benchmarks", "docs")
    }
    assert {str(path): count for path, count in counts.items() if count >= MOST_LINES} == {}


def test_no_tracked_file_names_a_folder_of_a_machine():
    assert lines_that_match(MACHINE_PATH) == []


def test_no_tracked_file_names_a_package_index():
    assert lines_that_match(REGISTRY) == []


def test_no_tracked_file_is_large():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked_files()}
    assert {name: size for name, size in sizes.items() if size > MOST_BYTES and name not in WEIGHTS} == {}
    assert sum(sizes.get(name, 0) for name in WEIGHTS) <= MOST_BYTES_OF_WEIGHTS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cd /home/" + "someone/headway", True),
        ('path = "/tmp/' + 'run"', True),
        ("https://example.org/opt/" + "thing", False),
        ("docs/home/page.md", False),
    ],
)
def test_the_check_for_folders_of_a_machine_sees_them(line: str, found: bool):
    assert bool(MACHINE_PATH.search(line)) == found


@pytest.mark.parametrize("path", python_files("src"), ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_modules_begin_with_a_short_docstring(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "say what one gets"
    first = docstring.splitlines()[0]
    assert len(first) <= LONGEST_FIRST_LINE, f"{len(first)} characters: {first}"


@pytest.mark.parametrize("path", python_files("src"), ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_library_prints_nothing_and_is_ascii(path: Path):
    text = path.read_text(encoding="utf-8")
    prints = [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []
    assert text.isascii(), next(line for line in text.splitlines() if not line.isascii())
