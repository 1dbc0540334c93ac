import pytest
import torch
from transformers import LlamaConfig

from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM


@pytest.fixture
def model() -> MultiTokenLM:
    """A random byte model with n = 4 whose offsets disagree."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=257,
    )
    return MultiTokenLM.from_config(config, MultiTokenConfig(num_future_tokens=4)).eval()
