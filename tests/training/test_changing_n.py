"""Changing n on a trained model with heads of every architecture: those that stay are untouched, new ones start as usual."""

from __future__ import annotations

import pytest
import torch

from head_cases import ARCHITECTURES, CHANGES_BASE
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.training.starting_model import model_from_folder
from tiny_models import random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 14)
NAMES = [name for name in ARCHITECTURES if name not in CHANGES_BASE]


def future(model):
    with torch.no_grad():
        return model.eval()(TOKENS, return_future_logits=True, use_cache=False).future_logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of three offsets per architecture, and one without heads."""
    top = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_model(num_future_tokens=3, **ARCHITECTURES[name]).save_pretrained(top / name)
    tiny_base("llama").save_pretrained(top / "plain")
    return top


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_that_stay_predict_what_they_did(folders, name, n):
    before = future(tiny_model(num_future_tokens=3, **ARCHITECTURES[name]))
    model = model_from_folder(folders / name, MultiTokenConfig(num_future_tokens=n, **ARCHITECTURES[name]))
    after, kept = future(model), min(n, 3)
    assert after.shape[2] == n
    torch.testing.assert_close(after[:, :, :kept], before[:, :, :kept], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_next_token_model_gets_heads_as_attach_heads_starts_them(folders, name):
    config = MultiTokenConfig(num_future_tokens=3, **ARCHITECTURES[name])
    torch.manual_seed(5)
    from_folder = future(model_from_folder(folders / "plain", config))
    base = tiny_base("llama")
    torch.manual_seed(5)
    torch.testing.assert_close(from_folder, future(attach_heads(base, config)), rtol=0, atol=0, equal_nan=True)
