"""The commands that the pages show run, and print what the pages show.

A page marks a block that is to be run, and may show what it prints:

    <!-- run -->
    ```bash
    headway info 30M
    ```
    <!-- output -->
    ```text
    parameters  64.40 M
    ...
    ```

The blocks of one page run in order in one empty folder. A shown line matches an output line (stdout and stderr
together, colours removed) that contains its words in order; a word with a digit in it stands for any word, `...` for
anything. Shown lines must appear in the order shown, with any lines between them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
LIMIT_SECONDS = 600

BLOCK = re.compile(
    r"^<!-- run -->\s*^```bash\n(?P<script>.*?)^```[ \t]*\n"
    r"(?:\s*^<!-- output -->\s*^```text\n(?P<output>.*?)^```[ \t]*$)?",
    re.MULTILINE | re.DOTALL,
)
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Block(NamedTuple):
    script: str
    output: str


def marked_blocks(text: str) -> list[Block]:
    return [Block(match["script"], match["output"] or "") for match in BLOCK.finditer(text)]


def line_pattern(line: str) -> re.Pattern[str]:
    words = []
    for word in line.split():
        if word == "...":
            words.append(".*")
        else:
            words.append(r"\S+" if any(character.isdigit() for character in word) else re.escape(word))
    return re.compile(r"\s+".join(words))


def first_unmatched_line(shown: str, printed: str) -> str | None:
    remaining = iter(ANSI.sub("", printed).splitlines())
    for line in shown.splitlines():
        if not line.strip() or line.strip() == "...":
            continue
        pattern = line_pattern(line)
        if not any(pattern.search(candidate) for candidate in remaining):
            return line
    return None


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_marked_commands_run_and_print_what_the_page_shows(page: Path, tmp_path: Path):
    blocks = marked_blocks(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("nothing on this page is marked to be run")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "HF_HUB_OFFLINE": "1",
    }
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block.script}\n{done.stdout}"
        unmatched = first_unmatched_line(block.output, done.stdout)
        assert unmatched is None, f"not printed: {unmatched}\nby:\n{block.script}\nwhich printed:\n{done.stdout}"


def test_a_block_is_run_only_where_it_is_marked():
    text = "```bash\nfalse\n```\n\n<!-- run -->\n```bash\ntrue\n```\n\n<!-- output -->\n```text\nyes\n```\n"
    assert marked_blocks(text) == [Block("true\n", "yes\n")]
    assert marked_blocks("<!-- run -->\n```bash\ntrue\n```\n\n```text\nno\n```\n") == [Block("true\n", "")]


@pytest.mark.parametrize(
    ("shown", "printed", "unmatched"),
    [
        ("loss 1.23 of 4\n", "step 9\nloss   0.99 of 4 heads\n", None),
        ("loss 1.23 nats\n", "loss 0.99 bits\n", "loss 1.23 nats"),
        ("a\nb\n", "b\na\n", "b"),
        ("a\n...\nb\n", "a\nx\ny\nb\n", None),
        ("identical: yes\n", "\x1b[32midentical:\x1b[0m yes\n", None),
        ("path ... end\n", "path some where end\n", None),
    ],
)
def test_output_is_matched_word_by_word_in_order(shown: str, printed: str, unmatched: str | None):
    assert first_unmatched_line(shown, printed) == unmatched
