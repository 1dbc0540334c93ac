import math

import pytest
import torch

from head_cases import head_model
from headway.errors import ConfigError, DataError
from headway.evaluation.acceptance import summarize_blocks
from headway.evaluation.first_block import first_block_acceptance
from tiny_models import random_tokens


def first_block(model, prompt):
    """Tokens that the first drafted block emits, from full forwards: the heads' drafts, told what was drafted before."""
    text = [*prompt.tolist(), int(model(prompt[None]).logits[0, -1].argmax())]
    position = len(prompt) - 1
    for offset in range(2, model.num_future_tokens + 1):
        # Drafts stand at the end of the text; heads that read tokens see those before them and no others.
        filled = torch.tensor([[*text, 0]])
        drafted = int(model(filled, return_future_logits=True).future_logits[0, position, offset - 1].argmax())
        chosen = int(model(torch.tensor([text])).logits[0, -1].argmax())
        if drafted != chosen:
            return offset - 1
        text.append(chosen)
    return model.num_future_tokens


@pytest.mark.parametrize("architecture", ["transformer", "sequential", "hydra", "transformer-markov"])
def test_it_is_what_heads_draft_after_the_models_own_next_token(architecture):
    model = head_model(architecture, dtype=torch.float64, perturb=0.0)
    with torch.no_grad():
        # A small vocabulary, so that some drafts are right.
        for matrix in (model.base.lm_head, *model.heads.vocabulary_matrices):
            matrix.weight[4:] = 0.0
        prompts = random_tokens(24, 7, seed=2) % 6
        lengths = [first_block(model, prompt) for prompt in prompts]
    result = first_block_acceptance(model, prompts, rows_per_forward=10)
    assert result == summarize_blocks(lengths, num_draft_tokens=3)
    assert 1 < result.mean_acceptance_length < 4


def test_without_heads_a_block_is_one_token():
    result = first_block_acceptance(head_model("transformer", num_future_tokens=1), random_tokens(3, 5))
    assert result.mean_acceptance_length == 1
    assert result.acceptance_rate == ()


def test_a_text_that_ends_at_once_counts_for_nothing():
    model = head_model("transformer")
    prompts = random_tokens(2, 5)
    model.generation_config.eos_token_id = int(model(prompts).logits[0, -1].argmax())
    assert first_block_acceptance(model, prompts[:1]).blocks == 0
    assert math.isnan(first_block_acceptance(model, prompts[:1]).mean_acceptance_length)
    assert first_block_acceptance(model, prompts).blocks == 1


def test_wrong_settings_name_their_limits():
    with pytest.raises(DataError, match=r"\[prompts, tokens\]"):
        first_block_acceptance(head_model("transformer"), random_tokens(5))
    with pytest.raises(ConfigError, match="rows_per_forward"):
        first_block_acceptance(head_model("transformer"), random_tokens(2, 5), rows_per_forward=0)
