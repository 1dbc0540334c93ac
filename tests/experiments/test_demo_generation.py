import pytest
import torch
from transformers import LlamaConfig

from headway.experiments.demo.generation import DemoPrompt, compare_prompt, generated_acceptance, record_generation
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM


@pytest.fixture(scope="module")
def model():
    """A model of three likely bytes whose heads copy its last layer: some drafts are accepted, some are not."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=256,
        pad_token_id=257,
    )
    model = MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=4)).eval()
    for head in model.heads:
        head.load_state_dict(model.family.last_layer.state_dict())
    with torch.no_grad():
        model.base.lm_head.weight[:97] = 0.0
        model.base.lm_head.weight[100:] = 0.0
    return model


PROMPT = DemoPrompt(source="a.py", tokens=tuple(b"def f(x):\n"))


def test_a_recording_has_a_moment_for_every_forward_pass(model):
    recording = record_generation(model, PROMPT, max_new_tokens=40, num_draft_tokens=None)
    assert len(recording.tokens) == sum(recording.lengths) == 40
    assert len(recording.moments) == len(recording.lengths) == recording.forwards + 1
    assert recording.lengths[0] == 1
    assert all(earlier <= later for earlier, later in zip(recording.moments, recording.moments[1:], strict=False))
    assert recording.moments[0] > 0
    assert recording.moments[-1] <= recording.seconds
    assert recording.tokens_per_forward == pytest.approx(39 / recording.forwards)


def test_a_plain_recording_emits_one_token_per_forward(model):
    recording = record_generation(model, PROMPT, max_new_tokens=10, num_draft_tokens=0)
    assert recording.lengths == (1,) * 10
    assert recording.tokens_per_forward == 1.0


def test_a_comparison_decodes_both_ways_and_finds_them_identical(model):
    comparison = compare_prompt(model, PROMPT, max_new_tokens=40)
    assert comparison.identical
    assert comparison.self_speculative.forwards < comparison.plain.forwards


def test_pooled_acceptance_agrees_with_the_engines_own_statistics(model):
    comparison = compare_prompt(model, PROMPT, max_new_tokens=40)
    result = model.generate(
        torch.tensor([PROMPT.tokens]), do_sample=False, max_new_tokens=40, return_dict_in_generate=True
    )
    pooled = generated_acceptance([comparison], num_draft_tokens=3)
    assert pooled.tokens_per_forward == pytest.approx(result.acceptance.mean_acceptance_length)
    assert pooled.blocks.blocks == comparison.self_speculative.forwards - 1
    assert pooled.blocks.length_counts[0] > 0
    assert sum(pooled.blocks.length_counts[1:]) > 0
    assert 0 < pooled.distinct_8grams <= 1
