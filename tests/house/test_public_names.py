"""The public face: few names, sorted, complete, and free to import."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import headway
from headway import errors

MOST_PUBLIC_NAMES = 15


def test_public_names_are_few_and_sorted():
    assert headway.__all__ == sorted(headway.__all__)
    assert len(set(headway.__all__)) == len(headway.__all__) <= MOST_PUBLIC_NAMES


@pytest.mark.parametrize("name", headway.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(headway, name) is not None
    assert name in dir(headway)


def test_nothing_public_is_missing_from_all():
    tree = ast.parse(Path(headway.__file__).read_text(encoding="utf-8"))
    typed_imports = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed_imports == set(headway.__all__), "what type checkers see is what `__all__` says"


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="MultiTokenLM"):
        _ = headway.MultiTokenLanguageModel


def test_import_headway_loads_neither_torch_nor_transformers():
    script = "import sys, headway; print(sorted({'torch', 'transformers', 'numpy', 'click'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_can_be_imported():
    package = Path(headway.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = ".".join(("headway", *path.relative_to(package).with_suffix("").parts))
        module = importlib.import_module(name.removesuffix(".__init__"))
        assert module.__file__ == str(path)


def test_every_error_of_headway_is_one_tree_and_drawn_in_its_module():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(kind, errors.HeadwayError) for kind in kinds if issubclass(kind, Exception))
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in kinds if issubclass(kind, Exception) and kind.__name__ not in drawn] == []
