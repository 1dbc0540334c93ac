"""docs/check.py finds what a page gets wrong, and nothing in a page that is right."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "three.py").write_text("1\n2\n3\n")
    (tmp_path / "docs" / "other.md").write_text("# The `other` page: part 1\n\n## Twice\n\n## Twice\n")
    (tmp_path / "Makefile").write_text("demo: x ## the demo\ntest:\n")
    return tmp_path


def faults(check: ModuleType, site: Path, text: str, name: str = "docs/page.md") -> list[str]:
    page = site / name
    page.write_text(text)
    return [fault.removeprefix(f"{name}: ") for fault in check.page_faults(page, site)]


def test_a_true_page_has_no_faults(check: ModuleType, site: Path):
    text = """# Page
See [other](other.md), [a part](other.md#the-other-page-part-1), [again](other.md#twice-1), [here](#page),
[web](https://example.org/x) and `src/three.py:3`. `[not a link](nowhere.md)`

```bash
make demo && headway --debug info 30M -n 4   # a comment with --no-such-flag
OMP_NUM_THREADS=1 headway info \\
    --context-length=512 | tail -n 1 > out.json
git log --no-such-flag-of-headway
```

```text
[also not a link](nowhere.md)
headway nonsense
```
"""
    assert faults(check, site, text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](gone.md)", "link to gone.md: no such file"),
        ("[x](other.md#gone)", "link to other.md#gone: no such heading"),
        ("[x](../../outside.md)", "link to ../../outside.md: no such file"),
        ('<img src="gone.png">', "link to gone.png: no such file"),
        ("`src/gone.py`", "src/gone.py: no such file"),
        ("`src/three.py:4`", "src/three.py:4: the file is shorter"),
        ("`src/three.py:2-9`", "src/three.py:9: the file is shorter"),
        ("```bash\nheadway trian\n```", "no such command: headway trian"),
        ("```bash\n$ headway info --gone\n```", "no such flag: headway info --gone"),
        ("```bash\nls | headway --gone\n```", "no such flag: headway headway --gone"),
        ("```bash\n.venv/bin/headway info -z\n```", "no such flag: headway info -z"),
        ("```bash\nmake gone\n```", "no such target: make gone"),
    ],
)
def test_a_fault_is_found_and_named(check: ModuleType, site: Path, text: str, fault: str):
    assert faults(check, site, text) == [fault]


def test_the_paper_index_points_at_lines_that_exist(check: ModuleType, site: Path):
    text = "a number (src/three.py:2), another (src/three.py:4), a third (src/gone.py:1)"
    found = faults(check, site, text, name="docs/paper_index.md")
    assert found == ["src/three.py:4: the file is shorter", "src/gone.py: no such file"]


def test_the_page_of_commands_shows_every_command_and_flag(check: ModuleType):
    page = check.cli_page()
    for name in check.COMMANDS:
        assert f"## headway {name}\n" in page
        for flag in check._flags(check._command(name)):
            assert flag in page, f"headway {name} {flag}"


def test_the_page_of_commands_does_not_depend_on_the_terminal(check: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    narrow = check.cli_page()
    monkeypatch.setenv("COLUMNS", "200")
    assert check.cli_page() == narrow


def test_the_committed_page_of_commands_is_what_help_says(check: ModuleType):
    assert (ROOT / "docs" / "cli.md").read_text() == check.cli_page(), "run `make docs`"


def test_an_unknown_argument_is_refused(check: ModuleType):
    assert check.main(["--wirte"]) == 2
