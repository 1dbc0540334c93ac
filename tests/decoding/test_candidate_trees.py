"""A tree of candidates gives the tokens of plain decoding in every family, and the caches of a plain forward."""

from __future__ import annotations

import pytest
import torch

from decoding_cases import base_continuation, near_ties, new_tokens, ragged_batch, script_candidates, script_drafts
from headway.decoding.cache import RaggedCache
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.masks import BlockMasks, additive_mask, tree_band
from headway.errors import DecodingError
from headway.functional.tree import Tree
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model

NEW = 24
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 1), (2, 0, 0)]
SINGLE = ragged_batch([9], "l")
# Lengths below and above the sliding window of 6; padding on both sides in one batch.
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
CASES = [(family, "eager" if family == "gemma2" else "sdpa", torch.float64) for family in FAMILIES] + [
    ("llama", "eager", torch.float64),
    ("mistral-sliding", "eager", torch.float64),
    ("llama", "sdpa", torch.float32),
    ("gemma3_text", "eager", torch.float32),
]


@pytest.mark.parametrize(("family", "attention", "dtype"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_every_path_of_a_tree_gives_the_tokens_of_plain_decoding(family, attention, dtype, monkeypatch):
    model = tiny_model(family, dtype=dtype)
    model.base.set_attn_implementation(attention)
    lengths = set()
    for batch in (SINGLE, RAGGED):
        rows = batch.rows()
        expected = [base_continuation(model, row, NEW) for row in rows]
        options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "return_dict_in_generate": True}
        heads = model.generate(batch.input_ids, tree=TREE, **options)
        with monkeypatch.context() as patch:
            script_candidates(patch, expected, ranks=4)
            scripted = model.generate(batch.input_ids, tree=TREE, **options)
        for result in (heads, scripted):
            differing = near_ties(model, rows, new_tokens(result, batch.input_ids.shape[1]), expected)
            assert differing == 0 or dtype == torch.float32
        lengths.update(length for row in scripted.acceptance.lengths for length in row)
    assert lengths == {1, 2, 3, 4}


def _largest_difference(model, batch, monkeypatch):
    """Keys and values of all layers, and the heads' hidden states, at every accepted position."""
    states, paths, starts = [], [], []
    tree_block, keep = EagerExecutor.tree_block, EagerExecutor.keep

    def recording_block(self, block_BR, positions, tree, *, num_offsets):
        states.append(tree_block(self, block_BR, positions, tree, num_offsets=num_offsets))
        starts.append(list(positions))
        return states[-1]

    def recording_keep(self, kept, positions):
        paths.append([tuple(path) for path in kept])
        keep(self, kept, positions)

    with monkeypatch.context() as patch:
        script_candidates(patch, [base_continuation(model, row, 60) for row in batch.rows()])
        patch.setattr(EagerExecutor, "tree_block", recording_block)
        patch.setattr(EagerExecutor, "keep", recording_keep)
        loop = ENGINE.start(model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=60, tree=TREE)
        with decoding_context(model):
            for _ in range(10):
                loop.step()
    worst, moved = 0.0, 0
    for row, prompt in enumerate(batch.rows()):
        text = [*prompt[0].tolist(), *loop.new_tokens(row)][:-1]
        layers = len(model.family.layers) + len(model.heads)
        full_cache = RaggedCache([None] * layers, batch=1, capacity=len(text), device=prompt.device)
        full_cache.begin_aligned(0, len(text))
        with torch.no_grad():
            full = model.offset_hidden_states(torch.tensor([text]), past_key_values=full_cache, use_cache=True)
        for found, kept, positions in zip(states, paths, starts, strict=True):
            for step, node in enumerate((0, *kept[row])):
                moved += node != step
                for head, reference in zip(found.future_hidden, full.future_hidden, strict=True):
                    difference = head[row, node] - reference[0, positions[row] + step]
                    worst = max(worst, float(difference.abs().max()))
        for layer, reference in zip(loop.executor.cache.layers, full_cache.layers, strict=True):
            for mine, theirs in ((layer.keys, reference.keys), (layer.values, reference.values)):
                worst = max(worst, float((mine[row, :, : len(text)] - theirs[0]).abs().max()))
    assert moved > 5
    return worst


@pytest.mark.parametrize("batch", [SINGLE, ragged_batch([3, 9, 6], "lrl")], ids=["alone", "ragged"])
@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "qwen3-sliding", "gemma3_text", "gpt2", "gpt_neox"])
def test_accepted_paths_leave_the_caches_of_a_full_forward(family, batch, monkeypatch):
    # Families whose norm computes in float32 can differ by one float32 rounding.
    assert _largest_difference(tiny_model(family, dtype=torch.float64), batch, monkeypatch) < 1e-5


def test_this_comparison_would_notice_paths_that_are_not_moved(monkeypatch):
    monkeypatch.setattr(RaggedCache, "move", lambda self, from_BA, to_BA: None)
    assert _largest_difference(tiny_model(dtype=torch.float64), RAGGED, monkeypatch) > 1e-2


@pytest.mark.parametrize("mistake", ["not moved", "siblings seen"])
def test_the_text_would_notice_too(mistake, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    script_candidates(monkeypatch, expected)
    if mistake == "not moved":
        monkeypatch.setattr(RaggedCache, "move", lambda self, from_BA, to_BA: None)
    else:
        monkeypatch.setattr(Tree, "ancestors", lambda self: torch.ones(len(self), len(self)).tril().bool())
    result = model.generate(
        RAGGED.input_ids,
        attention_mask=RAGGED.attention_mask,
        max_new_tokens=NEW,
        tree=TREE,
        return_dict_in_generate=True,
    )
    assert new_tokens(result, RAGGED.input_ids.shape[1]) != expected


@pytest.mark.parametrize("window", [None, 2, 4])
def test_a_chain_sees_as_a_tree_what_a_block_sees(window):
    band = tree_band(Tree.chain(3), 5, window=window, dtype=torch.float32)
    block = additive_mask(torch.arange(5, 9)[None], torch.arange(9), window=window, dtype=torch.float32)
    assert torch.equal(band[..., :-1], block)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_rows_that_stand_at_one_place_get_the_mask_of_any_row(family):
    config = FAMILIES[family]()
    tree = Tree.from_choices(TREE)
    window = getattr(config, "sliding_window", None)
    windows = [None, window] if getattr(config, "layer_types", None) else [window]
    cache = RaggedCache(windows, batch=2, capacity=40, device=torch.device("cpu"))
    masks = BlockMasks(config, cache, width=len(tree), dtype=torch.float32, device=torch.device("cpu"))
    root_B1 = torch.tensor([[17], [17]])
    cache.begin_aligned(17, len(tree))
    aligned = masks.aligned_tree(tree)
    cache.begin_ragged(root_B1 + torch.arange(len(tree)), first=17, end=17 + len(tree))
    ragged = masks.ragged_tree(tree, root_B1)
    kinds = sorted(aligned) if isinstance(aligned, dict) else [None]
    assert kinds
    for kind in kinds:
        one, several = (mask if kind is None else mask[kind] for mask in (aligned, ragged))
        assert torch.equal(one.expand_as(several), several)


def test_a_trained_looking_tree_takes_at_least_as_much_as_its_chain(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    batch = ragged_batch([5, 8], "lr")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 200, "return_dict_in_generate": True}
    chain = model.generate(batch.input_ids, **options).acceptance
    tree = model.generate(batch.input_ids, tree=24, **options).acceptance
    assert tree.mean_acceptance_length > chain.mean_acceptance_length
    assert float(tree.acceptance_rate[0]) > float(chain.acceptance_rate[0])


def test_statistics_of_a_tree_count_depths_and_not_nodes(monkeypatch):
    model = tiny_model()
    row = random_tokens(1, 5)
    truth = base_continuation(model, row, 13)
    script_candidates(monkeypatch, [truth], ranks=1)
    result = model.generate(row, max_new_tokens=13, tree=TREE, return_dict_in_generate=True).acceptance
    assert result.lengths == [[4, 4, 4]]
    assert result.acceptance_rate.tolist() == [1, 1, 1]
    assert result.emitted_tokens.tolist() == [12]


@pytest.mark.parametrize("new", [1, 2, 3, 5, 7])
def test_a_limit_inside_a_tree_gives_exactly_so_many_tokens(new, monkeypatch):
    model = tiny_model("gpt2")
    truth = [base_continuation(model, row, 10) for row in RAGGED.rows()]
    script_candidates(monkeypatch, truth)
    for options in ({}, {"repetition_penalty": 1.0, "min_p": None, "bad_words_ids": [[39, 39, 39]]}):
        out = model.generate(
            RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=new, tree=TREE, **options
        )
        assert out[:, 11:].tolist() == [row[:new] for row in truth]


def test_learned_positions_are_used_to_the_last_and_not_beyond():
    model = attach_heads(tiny_base("gpt2", n_positions=20), MultiTokenConfig(num_future_tokens=4, head_init="fresh"))
    batch = ragged_batch([6, 9, 3], "lrl")
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=12, tree=TREE)
    assert out[:, 9:].tolist() == [base_continuation(model, row, 12) for row in batch.rows()]


def test_processors_and_ends_act_along_the_path(monkeypatch):
    model = tiny_model()
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "eos_token_id": [5, 11, 23], "pad_token_id": 0}
    truth = [base_continuation(model, row, NEW, **options) for row in RAGGED.rows()]
    script_candidates(monkeypatch, truth)
    result = model.generate(
        RAGGED.input_ids,
        attention_mask=RAGGED.attention_mask,
        max_new_tokens=NEW,
        tree=TREE,
        return_dict_in_generate=True,
        **options,
    )
    assert new_tokens(result, RAGGED.input_ids.shape[1]) == truth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": 0}, "at least one drafted token: got tree=0"),
        ({"tree": True}, "at least one drafted token"),
        ({"tree": []}, "the tree has no path"),
        ({"tree": [(0, 0)]}, r"not \(0,\), where it begins"),
        ({"tree": [(0,), (0, 0)], "num_draft_tokens": 1}, "2 tokens deep, the heads draft 1"),
        ({"tree": [(40,)]}, "takes rank 40 of 40 tokens"),
        ({"tree": "abc"}, "a number of nodes, a list of paths"),
        ({"tree": 5, "drafts": "lookup"}, "drafts='heads' or 'heads"),
        ({"drafts": "lookup", "num_draft_tokens": 2}, "pass num_lookup_tokens"),
        ({"drafts": "assistant"}, r"drafts must be one of heads, lookup, heads\+lookup"),
        ({"lookup_ngram": 0}, "lookup_ngram must be a whole number of at least 1"),
    ],
)
def test_trees_and_lookups_that_cannot_be_are_refused(options, message):
    with pytest.raises(DecodingError, match=message):
        tiny_model().generate(random_tokens(1, 4), max_new_tokens=3, **options)


def test_a_model_without_heads_makes_no_tree():
    with pytest.raises(DecodingError, match="a tree needs heads that draft"):
        tiny_model(num_future_tokens=1).generate(random_tokens(1, 4), max_new_tokens=3, tree=4)


@pytest.mark.parametrize("options", [{"tree": 4}, {"drafts": "lookup"}, {"drafts": "heads+lookup"}])
def test_zero_drafts_are_plain_whatever_else_is_asked(options):
    row = random_tokens(1, 4)
    result = tiny_model().generate(row, max_new_tokens=6, num_draft_tokens=0, return_dict_in_generate=True, **options)
    assert result.mode == "plain"
    assert result.acceptance.lengths == [[1] * 5]


@pytest.mark.parametrize("heads", ["medusa", "linear", "replicated_unembedding"])
def test_other_parallel_heads_make_trees(heads):
    model = tiny_model(heads=heads, dtype=torch.float64)
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    out = model.generate(RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=NEW, tree=12)
    assert out[:, 11:].tolist() == expected


@pytest.mark.parametrize("wiring", ["causal", "anticausal"])
def test_chains_of_heads_make_trees(wiring):
    model = tiny_model(
        wiring=wiring, dtype=torch.float64, **({"allow_base_change": True} if wiring == "anticausal" else {})
    )
    plain = model.generate(
        RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=NEW, num_draft_tokens=0
    )
    out = model.generate(RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=NEW, tree=12)
    assert torch.equal(out, plain)


# ----------------------------------------------------------------------------------------------------- copied text


@pytest.mark.parametrize("drafts", ["lookup", "heads+lookup"])
@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "gpt2"])
def test_copied_drafts_change_nothing(family, drafts):
    model = tiny_model(family, dtype=torch.float64)
    prompt = random_tokens(1, 6).repeat(1, 3)
    batch = torch.cat((prompt, random_tokens(1, 18, seed=5)))
    plain = model.generate(batch, max_new_tokens=40, num_draft_tokens=0)
    for options in ({}, {"num_lookup_tokens": 1}, {"lookup_ngram": 1}, {"repetition_penalty": 1.1}):
        expected = plain
        if "repetition_penalty" in options:
            expected = model.generate(batch, max_new_tokens=40, num_draft_tokens=0, **options)
        assert torch.equal(model.generate(batch, max_new_tokens=40, drafts=drafts, **options), expected)


def test_repetition_is_copied_many_tokens_at_a_time_without_any_head():
    model = tiny_model(num_future_tokens=1)
    # A model that repeats: whatever it says, sooner or later greedy text of a tiny model loops.
    row = random_tokens(1, 5)
    plain = model.generate(row, max_new_tokens=200)
    looping = plain[:, :150]
    result = model.generate(looping, max_new_tokens=50, drafts="lookup", return_dict_in_generate=True)
    assert torch.equal(result.sequences, plain[:, :200])
    assert result.mode == "self-speculative"
    assert len(result.acceptance.acceptance_rate) == 8
    assert max(map(max, result.acceptance.lengths)) == 9


def test_a_filler_is_no_draft():
    model = tiny_model()
    batch = torch.cat((torch.tensor([[1, 2, 3, 1, 2]]), torch.tensor([[4, 5, 6, 7, 8]])))
    result = model.generate(batch, max_new_tokens=2, drafts="lookup", return_dict_in_generate=True)
    assert result.acceptance.forwards.tolist() == [1, 1]
    one = model.generate(batch[1:], max_new_tokens=3, drafts="lookup", return_dict_in_generate=True)
    texts = [*batch[1].tolist(), *one.sequences[0, 5:].tolist()]
    assert len(set(texts[:7])) == 7
    # Nothing in this text stood before, so nothing was drafted.
    assert one.acceptance.lengths == [[1, 1]]
    assert all(rate != rate for rate in one.acceptance.acceptance_rate.tolist())


def test_heads_and_copied_text_share_a_tree_and_take_the_longer_path(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    row = random_tokens(1, 5)
    plain = model.generate(row, max_new_tokens=200, num_draft_tokens=0)
    script_drafts(monkeypatch, [plain[0, 150:].tolist()], wrong=0.0)
    result = model.generate(
        plain[:, :150], max_new_tokens=50, drafts="heads+lookup", num_lookup_tokens=6, return_dict_in_generate=True
    )
    assert torch.equal(result.sequences, plain[:, :200])
    # Scripted heads are right 3 tokens ahead, the copied branch 6.
    assert max(map(max, result.acceptance.lengths)) == 7
