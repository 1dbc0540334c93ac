"""Heads that score a part of the vocabulary draft only from it, and change nothing in the text."""

from __future__ import annotations

import pytest
import torch

from decoding_cases import base_continuation, new_tokens, ragged_batch
from headway.decoding.draft_vocabulary import SlicedDrafts
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.model import LeanModel
from headway.errors import DecodingError
from tiny_models import VOCABULARY, random_tokens, tiny_model

PART = tuple(range(1, VOCABULARY, 3))
RAGGED = ragged_batch([5, 9, 2], "lrl")
HEADS = [
    ("llama", "transformer", {}),
    ("llama", "linear", {"markov_rank": 4}),
    ("llama", "replicated_unembedding", {}),
    ("llama", "hydra", {}),
    ("qwen2", "medusa", {}),
    ("llama", "sequential", {}),
    ("gemma2", "linear", {"markov_rank": 4}),
]


@pytest.mark.parametrize(("family", "heads", "options"), HEADS, ids=["-".join(map(str, case[:2])) for case in HEADS])
@pytest.mark.parametrize("executor", ["eager", "lean"])
def test_chains_and_trees_of_a_part_give_the_tokens_of_plain_decoding(family, heads, options, executor, monkeypatch):
    model = tiny_model(family, heads=heads, dtype=torch.float64, **options)
    expected = [base_continuation(model, row, 20) for row in RAGGED.rows()]
    drafted: set[int] = set()
    for name in ("block", "tree_block"):
        original = getattr(EagerExecutor, name)

        def recording(self, block_BM, positions, *arguments, original=original, **keywords):
            drafted.update(block_BM[:, 1:].flatten().tolist())
            return original(self, block_BM, positions, *arguments, **keywords)

        monkeypatch.setattr(EagerExecutor, name, recording)
    for tree in (None, [(0,), (1,), (4,), (0, 0), (1, 2)]):
        result = model.generate(
            RAGGED.input_ids,
            attention_mask=RAGGED.attention_mask,
            max_new_tokens=20,
            draft_vocabulary=list(reversed(PART)),
            tree=tree,
            executor=executor,
            return_dict_in_generate=True,
        )
        assert new_tokens(result, RAGGED.input_ids.shape[1]) == expected
        assert result.lossless
    assert drafted <= set(PART)
    assert len(drafted) > 1


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("family", "heads", "options"), HEADS[:5], ids=[case[1] for case in HEADS[:5]])
def test_scores_are_the_whole_models_inside_the_part_and_minus_infinity_outside(family, heads, options, lean):
    model = tiny_model(family, heads=heads, dtype=torch.float64, **options)
    run = LeanModel(model) if lean else model
    with torch.inference_mode():
        hidden_BD = torch.randn(3, 32, dtype=torch.float64)
        previous_B = random_tokens(3) if model.heads.markov is not None else None
        for offset in (2, 3):
            whole_BV = run.offset_logits(hidden_BD, offset=offset, previous=previous_B)
            part_BV = SlicedDrafts(run, model, PART).offset_logits(hidden_BD, offset=offset, previous=previous_B)
            outside_V = torch.ones(VOCABULARY, dtype=torch.bool)
            outside_V[list(PART)] = False
            torch.testing.assert_close(part_BV[:, ~outside_V], whole_BV[:, ~outside_V], rtol=0, atol=1e-12)
            assert bool((part_BV[:, outside_V] == -torch.inf).all())
            assert torch.equal(
                SlicedDrafts(run, model, PART).offset_logits(hidden_BD, offset=1),
                run.offset_logits(hidden_BD, offset=1),
            )


def test_rows_are_cut_again_when_weights_change():
    model = tiny_model(dtype=torch.float64)
    hidden_BD = torch.randn(3, 32, dtype=torch.float64)
    with torch.inference_mode():
        SlicedDrafts(model, model, PART)
    with torch.no_grad():
        model.family.lm_head.weight.mul_(2.0)
    with torch.inference_mode():
        part_BV = SlicedDrafts(model, model, PART).offset_logits(hidden_BD, offset=2)
        torch.testing.assert_close(part_BV[:, list(PART)], model.offset_logits(hidden_BD, offset=2)[:, list(PART)])


@pytest.mark.parametrize(("executor", "tree"), [("eager", None), ("lean", [(0,), (1,), (0, 0), (1, 0)])])
def test_drawn_drafts_of_a_part_leave_the_distribution_of_the_text(executor, tree):
    """Chi-square of the second and third new token, jointly with what plain sampling gives, over many seeds."""
    model = tiny_model(dtype=torch.float64, num_future_tokens=3)
    with torch.no_grad():
        model.family.lm_head.weight.mul_(0.5)
    draws, prompt_1T = 600, random_tokens(1, 6, seed=4)
    counts = torch.zeros(2, VOCABULARY)
    for side, options in enumerate(
        (
            {"num_draft_tokens": 0},
            {"draft_vocabulary": PART[:6], "sample_drafts": True, "tree": tree, "executor": executor},
        )
    ):
        out_BT = model.generate(
            prompt_1T.expand(draws, -1),
            attention_mask=torch.ones(draws, prompt_1T.shape[1], dtype=torch.long),
            max_new_tokens=3,
            do_sample=True,
            top_k=0,
            seed=11 + side,
            **options,
        )
        for column in (-2, -1):
            counts[side] += torch.bincount(out_BT[:, column], minlength=VOCABULARY)
    common = counts.sum(0) >= 10
    pooled = torch.cat((counts[:, common], counts[:, ~common].sum(1, keepdim=True)), dim=1)
    pooled = pooled[:, pooled.sum(0) > 0]
    expected = pooled.sum(0) / 2
    statistic = float(((pooled - expected) ** 2 / expected).sum())
    degrees = pooled.shape[1] - 1
    # Two samples of equal size; five standard deviations of chi-square above its mean.
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_draft_vocabulary_that_the_processors_forbid_drafts_nothing():
    model = tiny_model(dtype=torch.float64)
    prompt_1T = random_tokens(1, 6)
    result = model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=6,
        do_sample=True,
        seed=1,
        sample_drafts=True,
        draft_vocabulary=PART,
        suppress_tokens=list(PART),
        return_dict_in_generate=True,
    )
    assert int(result.acceptance.forwards[0]) == 5
    assert not set(result.sequences[0, 6:].tolist()) & set(PART)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocabulary": []}, "at least one token"),
        ({"draft_vocabulary": [1, 1]}, "a token twice"),
        ({"draft_vocabulary": [VOCABULARY]}, f"ids are 0..{VOCABULARY - 1}"),
        ({"draft_vocabulary": "abc"}, "a list of token ids"),
        ({"draft_vocabulary": [1, 2], "tree": [(2,)]}, "rank 2 of 2 tokens"),
        ({"draft_vocabulary": [1, 2], "drafts": "lookup"}, "what the heads draft from"),
    ],
)
def test_draft_vocabularies_that_cannot_be_are_refused(options, message):
    model = tiny_model()
    with pytest.raises(DecodingError, match=message):
        model.generate(random_tokens(1, 4), max_new_tokens=4, **options)
