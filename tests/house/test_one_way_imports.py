"""A module imports only from a strictly lower level or its own folder; only cli/ imports inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "headway"

LEVELS = {
    "errors": 0,
    "functional": 0,
    "provenance": 0,
    "processes": 1,
    "data": 1,
    "heads": 1,
    "losses": 1,
    "marginalization": 1,
    "model": 2,
    "decoding": 3,
    "adaptation": 3,
    "convert": 3,
    "training": 4,
    "evaluation": 4,
    "serving": 4,
    "experiments": 5,
    "cli": 6,
    "__main__": 7,
}
# The public face opens every room, on first use; the command line loads what it needs when it runs.
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
BELOW_THE_COMMAND_LINE = [path for path in MODULES if path.parent != PACKAGE / "cli"]


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it absolute"
            yield node.lineno, node.module or ""
            # `from headway import model` names a room, not an attribute
            if node.module == "headway":
                for name in node.names:
                    yield node.lineno, f"headway.{name.name}"


def violations(source: str, *, room: str) -> list[str]:
    found = []
    for line, module in imported_modules(ast.parse(source)):
        if module.split(".")[0] != "headway":
            continue
        target = room_of(module)
        if target is None or target == room:
            continue
        if target not in LEVELS:
            # only cli/ may use the lazy public face
            if room != "cli":
                found.append(f"line {line}: {module} is not a room")
        elif LEVELS[target] >= LEVELS[room]:
            found.append(f"line {line}: {room} (level {LEVELS[room]}) imports {module} (level {LEVELS[target]})")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVELS, f"{room} has no level: add it to LEVELS and to the design"
    assert violations(path.read_text(encoding="utf-8"), room=room) == []


@pytest.mark.parametrize("path", BELOW_THE_COMMAND_LINE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_imports_inside_functions(path: Path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inside = [
        f"line {node.lineno} in {function.name}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from headway.model.config import MultiTokenConfig", "losses"),
        ("import headway.training.loop", "evaluation"),
        ("from headway import decoding", "model"),
        ("from headway.cli.console import note", "experiments"),
    ],
)
def test_the_check_sees_an_import_that_goes_up(source: str, room: str):
    assert len(violations(source, room=room)) == 1


def test_the_check_lets_imports_go_down_and_stay_in_their_room():
    source = "from headway.errors import DataError\nfrom headway.model.tap import LastLayerTap\nimport torch"
    assert violations(source, room="model") == []


def test_rooms_open_with_a_docstring_and_nothing_else():
    for path in PACKAGE.rglob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path.relative_to(PACKAGE)} does more than describe its room"
        assert isinstance(body[0], ast.Expr), f"{path.relative_to(PACKAGE)} has no docstring"
