import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import recipes

    yield recipes
    del sys.modules["recipes"]


def test_the_page_has_every_recipe_as_it_is_and_every_size(page):
    assert page.faults() == []


@pytest.mark.parametrize("size", ["1M", "100M", "1.3B"])
def test_the_figures_of_the_page_are_those_of_a_plan_made_now(page, size):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.size_row(size) in page.part(text, page.BEGIN, page.END).splitlines()
