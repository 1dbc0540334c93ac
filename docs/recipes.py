"""Write or check the table of docs/guides/recipes.md: memory and step time of every size of Table S14.

    python docs/recipes.py            check that the page has a row for every recipe and size
    python docs/recipes.py --write    compute the table again (about two minutes), then check

The figures are those of `headway train --dry-run`; `tests/training/test_recipes_page.py` holds rows of the page to it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from headway.model.sizes import PAPER_SIZES
from headway.training.config import TrainConfig
from headway.training.config_file import recipe_names, resolve_config
from headway.training.devices import device_to_plan_for
from headway.training.estimate import plan_training

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "recipes.md"
BEGIN, END = "<!-- sizes: written by docs/recipes.py -->", "<!-- end of sizes -->"
RECIPES_BEGIN, RECIPES_END = "<!-- recipes: written by docs/recipes.py -->", "<!-- end of recipes -->"
DEVICE, PROCESSES = "H100", 8
GIB = 2**30
# The recipe in which the paper trains each size; the induction recipes have the smaller ones.
RECIPES = {
    **{size: f"gloeckle-induction-{size.lower()}" for size in ("1M", "3M", "10M", "30M", "100M", "300M", "1B")},
    **{size: f"gloeckle-{size.lower()}-91b" for size in ("0.3B", "0.6B", "1.3B", "3B")},
    "6.7B": "gloeckle-7b-200b",
    "13B": "gloeckle-13b-200b",
}


def size_row(size: str) -> str:
    """A row of the table: one micro-batch of one row, n = 4, on 1 and on 8 devices."""
    config = row_config(size)
    plan = plan_training(config, processes=PROCESSES)
    gib = {(layout.parallel, layout.gradient_checkpointing): layout.memory.total / GIB for layout in plan.layouts}
    time = plan.time_on(device_to_plan_for(DEVICE, precision=config.precision))
    assert time is not None, "a llama's operations are counted"
    cells = [
        size,
        f"`{RECIPES[size]}`",
        f"{plan.total_parameters / 1e6:,.0f} M",
        *(f"{gib[mode, on]:.1f}" for mode in ("none", "fsdp") for on in (False, True)),
        f"{time.tokens_per_second:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def row_config(size: str) -> TrainConfig:
    """What a row plans: the recipe of the size with micro-batches of one row, n = 4, sharded and recomputed."""
    overrides = {"batch_size": 1, "num_future_tokens": 4, "parallel": "fsdp", "gradient_checkpointing": True}
    return resolve_config(recipe=RECIPES[size], overrides=overrides)


def recipe_rows() -> list[str]:
    """One row per recipe: its size, n, tokens of a step of one process, steps, context, peak learning rate."""
    rows = []
    for name in recipe_names():
        config = resolve_config(recipe=name)
        size = config.size or f"{config.num_layers} layers of {config.hidden_size}"
        cells = (
            f"`{name}`",
            size,
            str(config.num_future_tokens),
            f"{config.tokens_per_step:,}",
            f"{config.steps:,}",
            f"{config.sequence_length}",
            f"{config.learning_rate:g}",
            f"{config.optimizer}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def part(text: str, begin: str, end: str) -> str:
    """What stands between two marks."""
    match = re.search(f"{re.escape(begin)}\n(.*?){re.escape(end)}", text, re.DOTALL)
    return "" if match is None else match[1]


def write() -> None:
    """Compute the tables and put them on the page."""
    text = PAGE.read_text(encoding="utf-8")
    sizes = [
        f"| size | recipe | parameters | 1 GPU, GiB | recomputing | {PROCESSES} GPUs, fsdp, GiB | recomputing | tokens/s of "
        f"{PROCESSES} x {DEVICE} |",
        "|---|---|---|---|---|---|---|---|",
        *map(size_row, PAPER_SIZES),
    ]
    recipes = [
        "| recipe | size | n | tokens of a step | steps | context | peak rate | optimizer |",
        "|---|---|---|---|---|---|---|---|",
        *recipe_rows(),
    ]
    for begin, end, lines in ((BEGIN, END, sizes), (RECIPES_BEGIN, RECIPES_END, recipes)):
        former = f"{begin}\n{part(text, begin, end)}{end}"
        text = text.replace(former, "\n".join([begin, *lines, end]))
    PAGE.write_text(text, encoding="utf-8")


def faults() -> list[str]:
    """What the page lacks; the sizes' figures themselves are computed only by --write."""
    text = PAGE.read_text(encoding="utf-8")
    rows = part(text, RECIPES_BEGIN, RECIPES_END).splitlines()[2:]
    found = [] if rows == recipe_rows() else ["the table of recipes is not what the recipes say"]
    sizes = [line.split("|")[1].strip() for line in part(text, BEGIN, END).splitlines()[2:]]
    if sizes != list(PAPER_SIZES):
        found.append("the table of sizes has not the rows of Table S14")
    return found


def main(arguments: list[str]) -> int:
    """Write or check; the exit status."""
    if arguments == ["--write"]:
        write()
    found = faults()
    for fault in found:
        sys.stderr.write(f"{PAGE.relative_to(ROOT)}: {fault}; run python docs/recipes.py --write\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
