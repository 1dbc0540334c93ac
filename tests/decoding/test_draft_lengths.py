"""Drafts whose length changes from forward to forward: any lengths give the text of plain decoding."""

from __future__ import annotations

import random

import pytest
import torch

from decoding_cases import base_continuation, near_ties, new_tokens, ragged_batch, script_candidates, script_picks
from head_cases import ARCHITECTURES, CHANGES_BASE, head_model
from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.controller import DraftController
from headway.decoding.drafting import LookupDrafter
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.gaps import REREAD
from headway.decoding.loop import DecodingLoop
from headway.functional.tree import Tree
from tiny_models import FAMILIES, random_tokens, tiny_model

NEW = 40
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")


def script_lengths(monkeypatch, choose):
    """Let `choose(number of the forward, K)` decide instead of costs and acceptance."""

    def begin(self, remaining=0):
        self.length = choose(len(self.lengths), self.longest) if self.lengths else self.longest
        self.lengths.append(self.length)
        return self.length

    monkeypatch.setattr(DraftController, "begin", begin)


def randomly(seed):
    rng = random.Random(seed)
    # Rests of random length, also longer than what is repeated when drafting goes on.
    state = {"left": 0, "length": 0}

    def choose(forward, longest):
        if state["left"] == 0:
            state["length"] = rng.choice([0, *range(longest + 1)])
            state["left"] = rng.choice([1, 1, 2, 5, REREAD + 4])
        state["left"] -= 1
        return state["length"]

    return choose


def _generate(model, batch=RAGGED, new=NEW, **options):
    return model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=new,
        num_draft_tokens="auto",
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_lengths_of_every_head_type_give_the_plain_text(architecture, monkeypatch):
    model = head_model(architecture, dtype=torch.float64)
    plain = model.generate(
        RAGGED.input_ids,
        attention_mask=RAGGED.attention_mask,
        max_new_tokens=NEW,
        num_draft_tokens=0,
        return_dict_in_generate=True,
    )
    expected = new_tokens(plain, RAGGED.input_ids.shape[1])
    if architecture not in CHANGES_BASE:
        assert expected == [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    chosen = set()
    for seed in range(2):
        with monkeypatch.context() as patch:
            script_picks(patch, expected, seed=seed)
            script_lengths(patch, randomly(seed))
            result = _generate(model)
        assert new_tokens(result, RAGGED.input_ids.shape[1]) == expected
        chosen.update(result.control.lengths)
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_lengths_in_every_family_give_the_plain_text(family, monkeypatch):
    model = tiny_model(family, dtype=torch.float64)
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    script_picks(monkeypatch, expected)
    script_lengths(monkeypatch, randomly(4))
    result = _generate(model)
    assert new_tokens(result, RAGGED.input_ids.shape[1]) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "gpt2"])
def test_random_depths_of_trees_give_the_plain_text(family, monkeypatch):
    model = tiny_model(family, dtype=torch.float64)
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    script_candidates(monkeypatch, expected)
    script_lengths(monkeypatch, randomly(5))
    result = _generate(model, tree=9)
    assert new_tokens(result, RAGGED.input_ids.shape[1]) == expected
    assert max(length for row in result.acceptance.lengths for length in row) > 2


@pytest.mark.parametrize("seed", range(3))
def test_random_lengths_draw_the_text_of_the_seed(seed, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": seed}
    plain = model.generate(
        RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=NEW, num_draft_tokens=0, **options
    )
    script_lengths(monkeypatch, randomly(seed))
    assert torch.equal(_generate(model, **options).sequences, plain)


@pytest.mark.parametrize("executor", ["eager", "lean"])
def test_the_controllers_own_lengths_give_the_plain_text(executor):
    model = tiny_model()
    rows = RAGGED.rows()
    expected = [base_continuation(model, row, 120) for row in rows]
    result = _generate(model, new=120, executor=executor)
    assert near_ties(model, rows, new_tokens(result, RAGGED.input_ids.shape[1]), expected) <= 1
    assert len(result.control.lengths) >= len(result.acceptance.lengths[0])
    assert 0 in result.control.lengths
    assert result.control.trials > 0
    assert result.control.to_dict()["seconds_per_forward"]["0"] > 0


# ------------------------------------------------------------------------------------------------- caches of the heads


def _rest_and_go_on(model, batch, rest, executor="eager"):
    """Draft, rest for so many forwards, draft again; the loop, and what each forward's heads gave."""
    pattern = [3] * 4 + [0] * rest + [3] * 5
    states = []
    block = EagerExecutor.block

    def recording(self, block_BM, positions, *, num_offsets):
        found = block(self, block_BM, positions, num_offsets=num_offsets)
        states.append((found, list(positions)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerExecutor, "block", recording)
        script_lengths(patch, lambda forward, longest: pattern[forward])
        loop = ENGINE.start(
            model,
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=4 * len(pattern) + 8,
            num_draft_tokens="auto",
            executor=executor,
        )
        with decoding_context(model):
            for _ in pattern:
                loop.step()
    return loop, states


def _missing(loop, row):
    """Slots of a row that its first head has no keys for."""
    hidden = loop.executor.cache.hidden.get(len(loop.executor.cache.layers) - 3)
    return set() if hidden is None else set(hidden[row].nonzero()[:, 0].tolist())


def _compare_caches(model, loop):
    """Largest difference between kept keys and values of the heads and a forward without a cache, missing ones apart."""
    worst, layers = 0.0, len(model.family.layers)
    for row, length in enumerate(loop.prompts.lengths):
        text = [*loop.prompts.ids_BP[row, :length].tolist(), *loop.new_tokens(row)][:-1]
        whole = RaggedCache([None] * (layers + 3), batch=1, capacity=len(text), device=torch.device("cpu"))
        whole.begin_aligned(0, len(text))
        with torch.no_grad():
            model.offset_hidden_states(torch.tensor([text]), past_key_values=whole, use_cache=True)
        held = [slot for slot in range(len(text)) if slot not in _missing(loop, row)]
        for kept, wanted in zip(loop.executor.cache.layers[layers:], whole.layers[layers:], strict=True):
            for mine, theirs in ((kept.keys, wanted.keys), (kept.values, wanted.values)):
                worst = max(worst, float((mine[row, :, held] - theirs[0][:, held]).abs().max()))
    return worst


@pytest.mark.parametrize("rest", [5, REREAD + 6])
@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "gemma3_text", "gpt2"])
def test_after_a_rest_the_heads_hold_what_a_full_forward_says(family, rest):
    model = tiny_model(family, dtype=torch.float64)
    loop, _ = _rest_and_go_on(model, ragged_batch([3, 9, 6], "lrl"), rest)
    for row in range(3):
        # The forward that begins a rest still emits what it verified, so a little more than `rest` positions rested.
        assert (len(_missing(loop, row)) > 0) == (rest > REREAD)
        assert len(_missing(loop, row)) <= rest + 4 - REREAD if rest > REREAD else True
    assert _compare_caches(model, loop) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_missing_is_hidden_from_the_heads(family):
    model = tiny_model(family, dtype=torch.float64)
    batch = ragged_batch([3, 9, 6], "lrl")
    close = RaggedCache.hide

    def poisoned(self, index, value):
        for layer, hidden_BC in self.hidden.items():
            slots = hidden_BC[:, None, : self.allocated, None]
            self.layers[layer].keys.masked_fill_(slots, 1e4)
            self.layers[layer].values.masked_fill_(slots, 1e4)
        return close(self, index, value)

    _, clean = _rest_and_go_on(model, batch, REREAD + 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedCache, "hide", poisoned)
        loop, found = _rest_and_go_on(model, batch, REREAD + 6)
    assert _missing(loop, 0)
    for (mine, _), (theirs, _) in zip(found, clean, strict=True):
        for head, reference in zip(mine.future_hidden, theirs.future_hidden, strict=True):
            assert torch.equal(head, reference)
    # The test would see it: without hiding, the poison reaches the heads.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedCache, "hide", lambda self, index, value: (poisoned(self, index, value), value)[1])
        _, leaking = _rest_and_go_on(model, batch, REREAD + 6)
    differs = any(
        not torch.allclose(head, reference)
        for (mine, _), (theirs, _) in zip(leaking, clean, strict=True)
        for head, reference in zip(mine.future_hidden, theirs.future_hidden, strict=True)
    )
    # A window shorter than what is repeated never reaches a missing slot.
    assert differs == (attention_windows(model.config, num_heads=3)[-1] is None)


def test_a_lean_model_hides_the_same():
    model = tiny_model()
    batch = ragged_batch([3, 9, 6], "lrl")
    _, eager = _rest_and_go_on(model, batch, REREAD + 6)
    loop, lean = _rest_and_go_on(model, batch, REREAD + 6, executor="lean")
    assert _missing(loop, 1)
    for (mine, _), (theirs, _) in zip(lean, eager, strict=True):
        for head, reference in zip(mine.future_hidden, theirs.future_hidden, strict=True):
            assert torch.allclose(head, reference, atol=1e-4)


def test_no_head_runs_while_drafting_rests(monkeypatch):
    model = tiny_model()
    script_lengths(monkeypatch, lambda forward, longest: 0)
    calls = []
    for head in model.heads:
        head.register_forward_pre_hook(lambda *_: calls.append(1))
    drafts = []
    monkeypatch.setattr(EagerExecutor, "draft_logits", lambda *_, **__: drafts.append(1))
    loop = ENGINE.start(model, random_tokens(1, 5), max_new_tokens=20, num_draft_tokens=3)
    loop.controller = DraftController(3)
    loop.controller.lengths.append(0)
    with decoding_context(model):
        loop.run()
    assert calls == drafts == []
    assert loop.new_tokens(0) == base_continuation(model, random_tokens(1, 5), 20)


# ------------------------------------------------------------------------------------------------------------ copied text


def _repetitive(rows=3):
    """Prompts in which the text repeats itself, so that there is something to copy."""
    pieces = [random_tokens(1, 6, seed=row)[0] for row in range(rows)]
    return torch.stack([piece.repeat(4) for piece in pieces])


@pytest.mark.parametrize("drafts", ["lookup", "heads+lookup"])
@pytest.mark.parametrize("seed", range(2))
def test_random_lengths_of_copied_drafts_give_the_plain_text(drafts, seed, monkeypatch):
    model, ids = tiny_model(dtype=torch.float64), _repetitive()
    expected = model.generate(ids, max_new_tokens=NEW, num_draft_tokens=0)
    script_lengths(monkeypatch, randomly(seed))
    result = model.generate(
        ids, max_new_tokens=NEW, num_draft_tokens="auto", drafts=drafts, return_dict_in_generate=True
    )
    assert torch.equal(result.sequences, expected)
    assert len(set(result.control.lengths)) > 3


def test_text_that_was_not_drafted_can_be_copied_later(monkeypatch):
    """What comes while drafting rests is indexed too."""
    model, ids = tiny_model(dtype=torch.float64), random_tokens(1, 5)
    texts = []
    block = LookupDrafter.block

    def watching(self, standing, last_B1, *, depth):
        found = block(self, standing, last_B1, depth=depth)
        texts.append(list(self._indices[0]._tokens))
        return found

    monkeypatch.setattr(LookupDrafter, "block", watching)
    script_lengths(monkeypatch, lambda forward, longest: 4 if forward % 7 == 6 else 0)
    result = model.generate(
        ids, max_new_tokens=NEW, num_draft_tokens="auto", drafts="lookup", return_dict_in_generate=True
    )
    text = result.sequences[0].tolist()
    assert len(texts) > 3
    for seen in texts:
        assert seen == text[: len(seen)]


# ---------------------------------------------------------------------------------------------------------------- trials


def _always_trying(monkeypatch, every):
    """Drafts are never verified, and tried again and again."""
    heard = []

    def begin(self, remaining=0):
        self.trial = self.longest if len(self.lengths) % every == 0 else 0
        self.lengths.append(0)
        return 0

    monkeypatch.setattr(DraftController, "begin", begin)
    monkeypatch.setattr(
        DraftController, "compared", lambda self, depth, tried, right, *, over: heard.append((depth, tried, right))
    )
    return heard


@pytest.mark.parametrize("options", [{}, {"tree": 9}, {"drafts": "lookup"}, {"drafts": "heads+lookup"}], ids=str)
def test_a_trial_changes_nothing_and_says_how_often_drafts_are_right(options, monkeypatch):
    model, ids = tiny_model(dtype=torch.float64), _repetitive()
    expected = model.generate(ids, max_new_tokens=NEW, num_draft_tokens=0)
    drafted = []
    next_block = DecodingLoop._next_block

    def watching(self, states, emissions, longest):
        found = next_block(self, states, emissions, longest)
        if found.depth:
            drafted.append((found, NEW - self._rooms[0]))
        return found

    heard = _always_trying(monkeypatch, every=10)
    monkeypatch.setattr(DecodingLoop, "_next_block", watching)
    result = model.generate(ids, max_new_tokens=NEW, num_draft_tokens="auto", return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)
    assert result.acceptance.mean_acceptance_length == 1
    # By the definition: walk the text that came after each draft down its tree.
    counts = []
    for block, made in drafted:
        tree = block.tree or Tree.chain(block.depth)
        found = {row: [0] for row in range(len(ids))}
        for depth in range(min(block.depth, NEW - made)):
            tried = len(found)
            for row in list(found):
                token = int(expected[row, ids.shape[1] + made + depth])
                real = [] if block.absent is None else block.absent[row]
                below = [c for node in found.pop(row) for c in tree.children[node] if c not in real]
                if hits := [c for c in below if int(block.tokens_BM[row, c]) == token]:
                    found[row] = hits
            counts.append((depth + 1, tried, len(found)))
            if not found:
                break
    assert heard == counts
    assert len(heard) > 3


@pytest.mark.parametrize("architecture", ["transformer", "sequential", "linear"])
def test_trials_of_every_kind_of_head_change_nothing(architecture, monkeypatch):
    model = head_model(architecture, dtype=torch.float64)
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    heard = _always_trying(monkeypatch, every=9)
    assert new_tokens(_generate(model), RAGGED.input_ids.shape[1]) == expected
    assert heard
