"""The recipes of the paper say what its Tables S13 and S14 say."""

from typing import NamedTuple

import pytest
import yaml

from headway.model.sizes import PAPER_SIZES
from headway.training.config_file import recipe_names, recipe_summaries, recipe_text, resolve_config
from headway.training.step_shape import step_shape

MEBI = 2**20


class Row(NamedTuple):
    """A row of Table S13: batch in units of 2^20 tokens, steps, warm-up, peak learning rate, context, decay ratio."""

    batch: float
    steps: int
    warmup: int
    learning_rate: float
    context: int
    decay_ratio: float


CODE = {"learning_rate": 3e-4, "context": 4096, "decay_ratio": 0.03}
SUMMARIES = {
    "bigpatent": 76_680,
    "cnn-dailymail": 7_140,
    "multi-news": 3_330,
    "orangesum": 360,
    "pn-summary": 3_450,
    "samsum": 60,
    "thaisum": 23_640,
    "wikisummary": 2_550,
    "xsum": 2_760,
}
INDUCTION = ("1M", "3M", "10M", "30M", "100M", "300M", "1B")
TABLE_S13: dict[str, tuple[str, Row]] = {
    **{f"gloeckle-{size.lower()}-91b": (size, Row(8, 10_850, 1000, **CODE)) for size in ("0.3B", "0.6B", "1.3B", "3B")},
    "gloeckle-7b-scaling": ("6.7B", Row(8, 25_000, 2000, **CODE)),
    "gloeckle-13b-200b": ("13B", Row(8, 25_000, 1000, **CODE)),
    "gloeckle-7b-200b": ("6.7B", Row(8, 25_000, 2000, **CODE)),
    "gloeckle-7b-500b": ("6.7B", Row(7, 68_570, 2000, **CODE)),
    "gloeckle-7b-1t": ("6.7B", Row(7, 136_240, 2000, **CODE)),
    "gloeckle-7b-bytes": ("6.7B", Row(12, 25_000, 2000, 3e-4, 8192, 0.03)),
    "gloeckle-7b-language-200b": ("6.7B", Row(8, 25_000, 2000, 3e-4, 4096, 0.10)),
    "gloeckle-7b-language-500b": ("6.7B", Row(8, 60_000, 2000, 3e-4, 4096, 0.10)),
    **{f"gloeckle-induction-{size.lower()}": (size, Row(0.25, 100_000, 2000, 1e-4, 2048, 0.03)) for size in INDUCTION},
    **{
        f"gloeckle-induction-books-{size.lower()}": (size, Row(0.5, 50_000, 2000, 1e-4, 2048, 0.03))
        for size in INDUCTION
    },
    "gloeckle-arithmetic-30m": ("30M", Row(0.25, 100_000, 2000, 1e-4, 1024, 0.03)),
    "gloeckle-arithmetic-100m": ("100M", Row(0.25, 100_000, 2000, 1e-4, 2048, 0.03)),
    **{
        # SAMSum has fewer steps than the warm-up of its row: the longest one that fits
        f"gloeckle-summarize-{name}": ("6.7B", Row(0.125, steps, min(100, steps - 1), 3e-5, 4096, 0.03))
        for name, steps in SUMMARIES.items()
    },
    "gloeckle-7b-codecontests": ("6.7B", Row(0.25, 13_000, 400, 5e-5, 4096, 0.004)),
}


def test_every_row_of_the_paper_has_a_recipe_and_no_other_is_called_so():
    assert {name for name in recipe_names() if name.startswith("gloeckle-")} == TABLE_S13.keys()
    assert {size for size, _ in TABLE_S13.values()} == PAPER_SIZES.keys()


@pytest.mark.parametrize("name", TABLE_S13)
def test_a_recipe_of_the_paper_has_the_numbers_of_its_row(name):
    size, row = TABLE_S13[name]
    config = resolve_config(recipe=name)
    assert config.size == size
    assert step_shape(config, processes=1).tokens == row.batch * MEBI
    assert (config.steps, config.total_warmup_steps) == (row.steps, row.warmup)
    assert (config.learning_rate, config.decay_ratio) == (row.learning_rate, row.decay_ratio)
    assert config.sequence_length == row.context
    # appendix M
    assert (config.optimizer, config.betas, config.weight_decay) == ("adamw", (0.9, 0.95), 0.1)
    assert config.gradient_clip == (0.1 if name == "gloeckle-7b-codecontests" else 1.0)
    assert config.tie_embeddings is False


@pytest.mark.parametrize("name", TABLE_S13)
def test_beside_every_value_of_a_recipe_of_the_paper_stands_where_it_is_from(name):
    text = recipe_text(name)
    bare = [line for line in text.splitlines() if line and not line.startswith(("#", "output:")) and "#" not in line]
    assert bare == []
    for key in (
        "steps",
        "learning_rate",
        "sequence_length",
        "warmup_steps",
        "decay_ratio",
        "gradient_accumulation_steps",
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key}:")]
        assert '"' in line, line
        assert "Table S13" in line, line


@pytest.mark.parametrize(("name", "processes"), [("one-gpu-0.3b", 1), ("one-node-1.3b", 8), ("four-nodes-7b", 32)])
def test_the_recipes_of_nodes_have_the_tokens_that_they_say_on_as_many_processes(name, processes):
    tokens = step_shape(resolve_config(recipe=name), processes=processes).tokens
    assert tokens == (2**18 if name == "one-gpu-0.3b" else 8 * MEBI)


def test_every_recipe_begins_with_a_line_on_what_it_trains():
    summaries = recipe_summaries()
    assert summaries.keys() == set(recipe_names())
    assert all(20 <= len(summary) <= 120 for summary in summaries.values()), summaries


@pytest.mark.parametrize("name", ["tiny-bytes", "demo-bytes", "code-100m", "one-gpu-0.3b", "gloeckle-7b-bytes"])
def test_no_key_of_a_recipe_is_lost(name):
    config, keys = resolve_config(recipe=name).to_dict(), yaml.safe_load(recipe_text(name))
    for key, value in keys.items():
        assert config[key] == (float(value) if isinstance(config[key], float) else value), key


def test_a_recipe_of_finetuning_gives_its_shape_up_for_the_model_that_it_starts_from():
    config = resolve_config(
        recipe="gloeckle-7b-codecontests", overrides={"init_from": "some/model", "tokenizer": "auto"}
    )
    assert config.size is None
    assert config.init_from == "some/model"
