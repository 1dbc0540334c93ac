import pytest
import torch

from head_cases import head_model
from headway.errors import DecodingError
from headway.evaluation.head_caches import check_head_caches
from headway.evaluation.step_bytes import WeightReads, bytes_per_step
from headway.heads.sequential import SequentialHeads
from tiny_models import random_tokens

PROMPT = random_tokens(11, seed=1)


def sizes(*modules):
    return sum(parameter.numel() * 4 for module in modules for parameter in module.parameters())


def test_a_plain_step_reads_every_weight_once_and_one_row_of_the_embedding():
    model = head_model("transformer")
    read = bytes_per_step(model, PROMPT, num_draft_tokens=0)
    embedding = model.base.model.embed_tokens
    assert read.weights == sizes(model.base) - sizes(embedding) + 32 * 4
    # Keys and values of 3 layers, 4 heads of width 8, float32.
    assert read.cache == 2 * 3 * 4 * 8 * 4 * 11
    assert read.total == read.weights + read.cache == read.to_json()["total"]


def test_a_drafting_step_reads_the_heads_too_and_the_shared_unembedding_twice():
    model = head_model("transformer")
    plain, drafted = bytes_per_step(model, PROMPT, num_draft_tokens=0), bytes_per_step(model, PROMPT)
    heads, shared = sizes(model.heads), sizes(model.base.lm_head, model.family.norm)
    # Four embedded tokens instead of one.
    assert drafted.weights == plain.weights + heads + shared + 3 * 32 * 4
    assert drafted.cache == plain.cache * 6 // 3
    assert drafted.num_draft_tokens == 3


def test_a_shared_module_is_read_once_for_every_depth():
    own, shared = (head_model(name) for name in ("sequential", "sequential-shared"))
    assert sizes(shared.heads) == sizes(own.heads) // 3
    assert bytes_per_step(shared, PROMPT).weights == bytes_per_step(own, PROMPT).weights


def test_own_unembeddings_are_read_instead_of_the_shared_one():
    model = head_model("replicated")
    plain, drafted = bytes_per_step(model, PROMPT, num_draft_tokens=0), bytes_per_step(model, PROMPT)
    assert drafted.weights - plain.weights == sizes(model.heads) + 3 * 32 * 4


def test_views_are_free_and_their_use_is_not():
    layer = torch.nn.Linear(6, 3, bias=False)
    with torch.no_grad(), WeightReads(layer) as reads:
        view = layer.weight.T[:2]
        assert reads.num_bytes == 0
        torch.ones(1, 2) @ view
    assert reads.num_bytes == 2 * 3 * 4


@pytest.mark.parametrize(
    "architecture", ["transformer", "causal", "anticausal", "sequential", "sequential-shared", "hydra"]
)
def test_caches_after_ragged_blocks_are_those_of_a_whole_forward(architecture):
    model = head_model(architecture, dtype=torch.float64)
    check = check_head_caches(model, random_tokens(3, 40, seed=2), prompt_tokens=6, blocks=6)
    assert check.relative < 1e-6
    assert 1 in check.block_lengths
    assert check.largest_value > 0.1
    assert check.head_layers == (0 if architecture == "hydra" else 3)
    # At least the prompts' and the blocks' positions of every layer, keys and values.
    assert check.entries >= 2 * (3 + check.head_layers) * 3 * 4 * 8 * (6 + 6 - 4)


def test_the_check_of_caches_notices_entries_left_from_rejected_drafts(monkeypatch):
    model = head_model("sequential", dtype=torch.float64)
    monkeypatch.setattr(SequentialHeads, "lookback", lambda self, num_heads: 0)
    assert check_head_caches(model, random_tokens(3, 40, seed=2), prompt_tokens=6, blocks=6).relative > 1e-2


def test_the_check_follows_the_texts_and_tells_rows_apart():
    model = head_model("transformer", dtype=torch.float64)
    # A text of the model's own: every draft that its heads could get right is accepted.
    own = model.generate(random_tokens(2, 6, seed=3), max_new_tokens=40, num_draft_tokens=0)
    assert check_head_caches(model, own, prompt_tokens=6, blocks=4).relative < 1e-6
    with pytest.raises(DecodingError, match="same prompt"):
        check_head_caches(model, random_tokens(1, 40).repeat(2, 1), prompt_tokens=6, blocks=4)


@pytest.mark.parametrize(("tokens", "blocks"), [(40, 1), (20, 8)])
def test_a_check_without_a_block_after_the_prefill_or_with_too_short_a_text_is_refused(tokens, blocks):
    with pytest.raises(DecodingError, match="at least 2 blocks"):
        check_head_caches(head_model("transformer"), random_tokens(1, tokens), prompt_tokens=6, blocks=blocks)
