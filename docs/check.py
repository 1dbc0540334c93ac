"""Check that the pages of the project tell the truth about its commands and files.

    python docs/check.py            verify; one line per fault, exit status 1 if there is any
    python docs/check.py --write    regenerate docs/cli.md from the commands' own --help, then verify

Verified: docs/cli.md equals --help; relative links and their anchors resolve; every path of the repository named in
backticks exists, and has the line where one is given; every `headway` command, flag and `make` target in a ```bash
fence exists.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click

from headway.cli.main import COMMANDS, headway_group

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = "docs/cli.md"
HELP_WIDTH = 100
CLI_PREFACE = (
    "# The command line\n\nGenerated from `--help` by `make docs`; `make docs-check` fails when it is stale.\n"
)

FENCE = re.compile(r"^```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"(?P<html>[^\"]+)\"")
FILE_SPAN = re.compile(
    r"`(?P<path>(?:src|tests|docs|benchmarks|examples)/[\w./-]*[\w/])(?:(?::(?P<line>\d+)(?:-(?P<last>\d+))?)|::[^`]*)?`"
)
LINE_REFERENCE = re.compile(
    r"(?<![\w/.-])(?P<path>(?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|toml|json)):(?P<line>\d+)(?:-(?P<last>\d+))?"
)


def main(arguments: list[str]) -> int:
    """Write or verify the pages; return the exit status."""
    if arguments not in ([], ["--write"]):
        click.echo("usage: python docs/check.py [--write]", err=True)
        return 2
    if arguments == ["--write"]:
        (ROOT / CLI_PAGE).write_text(cli_page(), encoding="utf-8")
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    faults = [] if _is_current() else [f"{CLI_PAGE}: not what --help says; run `make docs`"]
    for page in pages:
        faults += page_faults(page, ROOT)
    for fault in faults:
        click.echo(fault, err=True)
    click.echo(f"docs: {len(pages)} pages, {len(faults)} faults", err=True)
    return 1 if faults else 0


def cli_page() -> str:
    """The text of docs/cli.md: the help of `headway`, of each of its commands, and of theirs."""
    sections = [("headway", headway_group.get_help(_context(headway_group)))]
    for name in COMMANDS:
        command = _command(name)
        context = _context(command)
        sections.append((f"headway {name}", command.get_help(context)))
        for inner_name, inner in _inner_commands(command).items():
            inner_context = _context(inner, parent=context)
            sections.append((f"headway {name} {inner_name}", inner.get_help(inner_context)))
    return CLI_PREFACE + "".join(f"\n## {title}\n\n```text\n{text}\n```\n" for title, text in sections)


def page_faults(page: Path, root: Path) -> list[str]:
    """What is wrong on one page, one line each, with the page's name in front."""
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    found = [*_link_faults(page, prose, root), *_file_faults(prose, root)]
    if page.name == "paper_index.md":
        found += _line_reference_faults(prose, root)
    for fence in FENCE.finditer(text):
        if fence["kind"] == "bash":
            found += _command_faults(fence["body"], root)
    return [f"{page.relative_to(root)}: {fault}" for fault in dict.fromkeys(found)]


def heading_anchors(text: str) -> set[str]:
    """Anchors that a Markdown page offers, by GitHub's rule: lower case, no punctuation, hyphens for blanks."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = sum(1 for anchor in anchors if re.fullmatch(re.escape(slug) + r"(-\d+)?", anchor))
        anchors.add(f"{slug}-{repeats}" if repeats else slug)
    return anchors | set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", text))


def _is_current() -> bool:
    page = ROOT / CLI_PAGE
    return page.exists() and page.read_text(encoding="utf-8") == cli_page()


def _link_faults(page: Path, prose: str, root: Path) -> Iterator[str]:
    for match in LINK.finditer(CODE_SPAN.sub("", prose)):
        target = match["target"] or match["html"]
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_relative_to(root) or not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in heading_anchors(file.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"


def _file_faults(prose: str, root: Path) -> Iterator[str]:
    for match in FILE_SPAN.finditer(prose):
        yield from _missing_line(match, root)


def _line_reference_faults(prose: str, root: Path) -> Iterator[str]:
    for match in LINE_REFERENCE.finditer(prose):
        yield from _missing_line(match, root)


def _missing_line(match: re.Match[str], root: Path) -> Iterator[str]:
    file = root / match["path"]
    if not file.exists():
        yield f"{match['path']}: no such file"
        return
    line = int(match["last"] or match["line"] or 0)
    if line and line > len(file.read_text(encoding="utf-8").splitlines()):
        yield f"{match['path']}:{line}: the file is shorter"


def _command_faults(script: str, root: Path) -> Iterator[str]:
    for words in _simple_commands(script):
        program, arguments = Path(words[0]).name, words[1:]
        if program == "headway":
            yield from _headway_faults(arguments)
        elif program == "make":
            yield from _make_faults(arguments, root)


def _simple_commands(script: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(re.sub(r"^\s*\$ ", "", line), posix=True, punctuation_chars="|&;()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;()"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):  # not the environment in front of a command
                words.append(word)


def _headway_faults(arguments: list[str]) -> Iterator[str]:
    command: click.Command = headway_group
    for word in arguments:
        if word == "--":
            return
        if command is headway_group and not word.startswith("-"):
            if word not in COMMANDS:
                yield f"no such command: headway {word}"
                return
            command = _command(word)
        elif isinstance(command, click.Group) and command is not headway_group and not word.startswith("-"):
            if word not in command.commands:
                yield f"no such command: headway {command.name} {word}"
                return
            command = command.commands[word]
        elif re.match(r"--?[a-zA-Z]", word):
            flag = word.partition("=")[0]
            if flag != "--debug" and flag not in _flags(command):
                yield f"no such flag: headway {command.name} {flag}"


def _flags(command: click.Command) -> set[str]:
    context = _context(command)
    flags = set(context.help_option_names)
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            flags |= {*parameter.opts, *parameter.secondary_opts}
    return flags


def _make_faults(arguments: list[str], root: Path) -> Iterator[str]:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for word in arguments:
        if re.fullmatch(r"[\w-]+", word) and not word.startswith("-") and word not in targets:
            yield f"no such target: make {word}"


def _inner_commands(command: click.Command) -> dict[str, click.Command]:
    return dict(command.commands) if isinstance(command, click.Group) else {}


def _context(command: click.Command, *, parent: click.Context | None = None) -> click.Context:
    # Commands take the names of their help option from the group, and keep the first that they were asked for.
    settings = headway_group.context_settings
    group = click.Context(headway_group, info_name="headway", terminal_width=HELP_WIDTH, **settings)
    if command is headway_group:
        return group
    return click.Context(command, info_name=command.name, parent=parent or group, terminal_width=HELP_WIDTH)


def _command(name: str) -> click.Command:
    command = headway_group.get_command(_context(headway_group), name)
    assert command is not None
    return command


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
