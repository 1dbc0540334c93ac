"""Random requests: whatever drafts, prompts, limits, ends and processors, the text is that of plain decoding."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from decoding_cases import new_tokens, ragged_batch
from headway.functional.tree import Tree, default_tree
from tiny_models import tiny_model

FAMILIES = ["llama", "qwen3-sliding", "gemma3_text", "gpt2"]


@cache
def _model(family, future):
    return tiny_model(family, num_future_tokens=future, dtype=torch.float64, seed=future)


def _random_tree(rng, heads):
    if rng.random() < 0.4:
        return rng.randint(1, 20)
    grown = default_tree(heads, nodes=rng.randint(1, 14)).choices
    kept = [path for path in grown if rng.random() < 0.8]
    # A path needs its beginnings.
    whole = {path[:length] for path in kept for length in range(1, len(path) + 1)} or {(0,)}
    return list(Tree.from_choices(list(whole)).choices)


def _random_drafts(rng, heads):
    kind = rng.choice(["chain", "chain", "tree", "tree", "lookup", "heads+lookup"])
    if kind == "chain":
        return {"num_draft_tokens": rng.randint(1, heads)}
    if kind == "tree":
        return {"tree": _random_tree(rng, heads)}
    drafts = {"drafts": kind, "num_lookup_tokens": rng.randint(1, 7), "lookup_ngram": rng.randint(1, 4)}
    return drafts | ({"tree": _random_tree(rng, heads)} if kind == "heads+lookup" and rng.random() < 0.5 else {})


def _random_request(rng):
    options = {"max_new_tokens": rng.choice([1, 2, 3, 9, 30]), "pad_token_id": 0}
    if rng.random() < 0.4:
        options["eos_token_id"] = rng.sample(range(1, 40), rng.randint(1, 4))
    if rng.random() < 0.3:
        options["repetition_penalty"] = 1.3
    if rng.random() < 0.2:
        options["no_repeat_ngram_size"] = 2
    if rng.random() < 0.2:
        options["min_new_tokens"] = rng.randint(1, options["max_new_tokens"])
    if rng.random() < 0.2:
        end = rng.randint(1, 39)
        options["stopping_criteria"] = [lambda ids, scores, **_: ids[:, -1] == end]
    if rng.random() < 0.5:
        options |= {"do_sample": True, "seed": rng.randint(0, 999), "top_k": rng.choice([0, 5])}
        options |= {"temperature": rng.choice([0.3, 1.0, 1.5]), "top_p": rng.choice([0.8, 1.0])}
    return options


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_random_drafts_give_the_text_of_plain_decoding(start):
    lengths = set()
    for seed in range(start, start + 20):
        rng = random.Random(seed)
        future = rng.choice([2, 4, 5])
        model = _model(rng.choice(FAMILIES), future)
        rows = rng.randint(1, 4)
        batch = ragged_batch([rng.randint(1, 14) for _ in range(rows)], rng.choices("lr", k=rows), seed=seed, pad=0)
        if rng.random() < 0.4:
            batch.input_ids[:] = batch.input_ids % 3 + 1
        request = _random_request(rng) | {"attention_mask": batch.attention_mask, "return_dict_in_generate": True}
        drafts = _random_drafts(rng, future - 1)
        plain = model.generate(batch.input_ids, num_draft_tokens=0, **request)
        found = model.generate(batch.input_ids, **request, **drafts)
        columns = batch.input_ids.shape[1]
        assert new_tokens(found, columns) == new_tokens(plain, columns), (seed, drafts)
        assert torch.equal(found.sequences, plain.sequences)
        lengths.update(length for row in found.acceptance.lengths for length in row)
    assert max(lengths) > 1
