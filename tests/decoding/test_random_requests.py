"""Random requests: one text whatever the drafts, and planted mistakes that are seen."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headway.decoding import choosing, engine, executor, masks
from headway.decoding.cache import RaggedLayer
from headway.decoding.choosing import GreedyChooser
from headway.decoding.executor import EagerExecutor
from headway.decoding.history import History
from headway.decoding.scored import RowSeeds
from headway.functional import acceptance
from headway.functional.sampling import KeyedDraws
from headway.functional.tree import Tree

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEED, MODELS, SLICE = 1, 19, 50


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_case(number: int) -> dict[str, Any]:
    from random_cases import run_case

    return run_case(number, seed=SEED, models=MODELS)


def draw_case(number: int) -> Any:
    from random_requests import draw_case

    return draw_case(number, seed=SEED, models=MODELS)


@pytest.mark.parametrize("start", range(0, 300, SLICE))
def test_drafts_of_any_kind_give_the_text_of_plain_decoding(start: int):
    lines = [run_case(number) for number in range(start, start + SLICE)]
    assert not [line for line in lines if line["wrong"]]
    assert sum(len(line["near_ties"]) for line in lines) <= 1
    # Drafts are accepted often, and almost all that were asked for are served.
    assert sum(line["accepted"] for line in lines) > 0.3 * sum(line["forwards"] for line in lines)
    assert sum(line["refused"] is not None for line in lines) < SLICE / 4


def test_cases_are_functions_of_their_number_and_cover_every_dimension():
    from random_cases import dimensions

    cases = [draw_case(number) for number in range(400)]
    assert dataclasses.asdict(cases[17]) == dataclasses.asdict(draw_case(17))
    counts = Counter(itertools.chain.from_iterable(map(dimensions, cases)))
    kinds = {"greedy", "sampled", "drawn", "drawn, one token"}
    drafts = {"chain", "tree", "dynamic", "lookup", "chain + lookup", "tree + lookup", "auto, chain", "auto, tree"}
    assert {value for name, value in counts if name == "kind"} == kinds
    assert {value for name, value in counts if name == "draft"} >= drafts
    assert len([value for name, value in counts if name == "processors"]) == 12
    assert len([value for name, value in counts if name == "heads"]) == 19
    assert len([value for name, value in counts if name == "family"]) == 13


def test_the_record_counts_failures_and_near_ties(monkeypatch: pytest.MonkeyPatch):
    from random_cases import summary

    monkeypatch.setattr(choosing, "right_drafts", one_draft_too_many)
    lines = [run_case(number) for number in cases_where(lambda case: case.kind == "greedy" and is_chain(case), 8)]
    found = summary(lines, seed=SEED, models=MODELS)
    assert found["failed"] == sum(bool(line["wrong"]) for line in lines) > 0
    assert found["failures"][0]["request"]["kind"] == "greedy"
    assert found["cases"] == sum(found["counts"]["kind"].values()) == 8


# ---------------------------------------------------------------------------------------------------- planted mistakes


def is_chain(case: Any) -> bool:
    """Whether a plain chain of the heads is drafted, with nothing to look at but end tokens."""
    return case.kind_of_draft == "chain" and not case.processors and not case.stop_strings and case.max_new_tokens > 3


def is_tree(case: Any) -> bool:
    """Whether nodes have siblings, and heads draft at once."""
    tree = case.drafts.get("tree")
    wide = isinstance(tree, int) or (isinstance(tree, list) and any(path[-1] for path in tree))
    return wide and case.max_new_tokens > 3 and case.spoilt is not None


def is_ragged(case: Any) -> bool:
    """Whether there is padding."""
    return len(set(map(len, case.prompts))) > 1


def cases_where(condition: Any, count: int) -> list[int]:
    """The first cases that have something."""
    found = (number for number in itertools.count() if condition(draw_case(number)))
    return list(itertools.islice(found, count))


right_drafts = choosing.right_drafts


def one_draft_too_many(drafts, target):
    """Mistake: off by one."""
    return min(right_drafts(drafts, target) + 1, len(drafts))


def last_draft_too_far(patch):
    """Mistake: the rotary position of a block's last token."""
    run = EagerExecutor._run

    def spoilt(self, ids, mask, position_ids, *args, **kwargs):
        if mask is not None and ids.shape[1] > 1:
            position_ids = position_ids.clone()
            position_ids[:, -1] += 1
        return run(self, ids, mask, position_ids, *args, **kwargs)

    patch.setattr(EagerExecutor, "_run", spoilt)


def siblings_see_each_other(patch):
    """Mistake: a mask of trees."""
    own = Tree.ancestors

    def spoilt(self):
        seen_RR = own(self)
        for children in self.children:
            for older, younger in itertools.pairwise(children):
                seen_RR[younger, older] = True
        return seen_RR

    patch.setattr(Tree, "ancestors", spoilt)


def path_is_not_moved(patch):
    """Mistake: an accepted path stays where the tree had it."""
    patch.setattr(EagerExecutor, "keep", lambda self, *args, **kwargs: None)


def slot_is_stale(patch):
    """Mistake: the first slot of a block keeps what a rejected draft left there."""
    update = RaggedLayer.update

    def spoilt(self, *args, **kwargs):
        owner = self.owner
        if not self.is_initialized or owner.width == 1 or owner.slots_BM is not None or owner.position == 0:
            return update(self, *args, **kwargs)
        kept = self.keys[:, :, owner.position].clone()
        out = update(self, *args, **kwargs)
        self.keys[:, :, owner.position] = kept
        return out

    patch.setattr(RaggedLayer, "update", spoilt)


def residual_of_the_draft(patch):
    """Mistake: after a rejection what is left of q, not of p."""
    own = acceptance.residual
    patch.setattr(acceptance, "residual", lambda p_V, q_V, weight=1.0: own(q_V, p_V))


def pad_counts(patch):
    """Mistake: the padding id next to a prompt is one of its tokens."""
    align = engine.align_prompts

    def spoilt(ids_BT, mask_BT, **kwargs):
        if mask_BT is not None:
            mask_BT = mask_BT.clone()
            mask_BT[:, :-1] |= mask_BT[:, 1:]
        return align(ids_BT, mask_BT, **kwargs)

    patch.setattr(engine, "align_prompts", spoilt)


def end_inside_a_block_is_missed(patch):
    """Mistake: only the last token of a block can end the text."""
    emit = GreedyChooser._emit

    def spoilt(self, target, accepted, room):
        whole = target[: min(accepted + 1, room)]
        if self._eos_token_ids.isdisjoint(whole[-1:]):
            return GreedyChooser(frozenset())._emit(target, accepted, room)
        return emit(self, target, accepted, room)

    patch.setattr(GreedyChooser, "_emit", spoilt)


def number_of_the_block(patch):
    """Mistake: all tokens of a block are drawn with the number of its first."""
    own = KeyedDraws.uniform
    patch.setattr(KeyedDraws, "uniform", lambda self, depth: own(self, 0))


def one_seed_for_all(patch):
    """Mistake: every row draws with the first row's numbers."""
    own = RowSeeds.draws
    patch.setattr(RowSeeds, "draws", lambda self, row, made: own(self, 0, made))


def processors_lag(patch):
    """Mistake: processors do not see the draft before the last one."""
    put = History.put
    patch.setattr(History, "put", lambda self, row, made, tokens: put(self, row, made, tokens[:1] + tokens[2:]))


def window_too_wide(patch):
    """Mistake: a position of a block sees one token too many."""
    own = masks.additive_mask

    def spoilt(*args, window, **kwargs):
        return own(*args, window=None if window is None else window + 1, **kwargs)

    patch.setattr(masks, "additive_mask", spoilt)


def piece_is_lost(patch):
    """Mistake: the first piece of a long prompt is not read."""
    own = executor.pieces
    patch.setattr(executor, "pieces", lambda columns, chunk: own(columns, chunk)[1:])


MISTAKES = {
    "one draft too many": (
        lambda patch: patch.setattr(choosing, "right_drafts", one_draft_too_many),
        lambda case: is_chain(case) and case.kind == "greedy",
    ),
    "last draft stands too far": (last_draft_too_far, lambda case: is_chain(case) and case.spoilt is not None),
    "siblings see each other": (siblings_see_each_other, is_tree),
    "accepted path is not moved": (path_is_not_moved, is_tree),
    "slot is stale": (slot_is_stale, lambda case: is_chain(case) and case.batch == 1),
    "residual of the wrong distribution": (residual_of_the_draft, lambda case: case.kind == "drawn, one token"),
    "a pad counts": (pad_counts, lambda case: is_ragged(case) and case.kind == "greedy"),
    "end inside a block": (
        end_inside_a_block_is_missed,
        lambda case: is_chain(case) and case.kind == "greedy" and len(case.eos) > 1 and case.spoilt is not None,
    ),
    "number of the block": (
        number_of_the_block,
        lambda case: is_chain(case) and case.kind == "sampled" and case.spoilt is not None,
    ),
    "one seed for all": (
        one_seed_for_all,
        lambda case: isinstance(case.seeds, tuple) and case.alone and case.kind == "sampled",
    ),
    "processors lag": (
        processors_lag,
        lambda case: {"no_repeat_ngram_size", "odd or even"} & case.processors.keys() and case.spoilt is not None,
    ),
    "window too wide": (
        window_too_wide,
        lambda case: is_chain(case) and "window" in case.model.family and case.spoilt is not None,
    ),
    "piece of a prompt is lost": (
        piece_is_lost,
        lambda case: case.chunk in (1, 2, 5) and max(map(len, case.prompts)) > 8 and case.kind == "greedy",
    ),
}
"""Name -> how to plant it, and which cases it concerns."""

WITHIN = 8
"""Cases of its kind within which each mistake has to be seen."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen_within_a_few_cases(mistake: str, monkeypatch: pytest.MonkeyPatch):
    plant, concerns = MISTAKES[mistake]
    numbers = cases_where(concerns, WITHIN)
    plant(monkeypatch)
    assert any(run_case(number)["wrong"] for number in numbers)
