"""The lean executor runs the same model: hidden states, drafts and caches agree with the family's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoding_cases import ragged_batch
from head_cases import ARCHITECTURES, head_model
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.admission import largest_gap, lean_model, why_not_lean
from headway.decoding.lean.linear import FusedLinear, can_pack
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import align_prompts
from tiny_models import FAMILIES, VOCABULARY, random_tokens, tiny_model

LEAN = [name for name in FAMILIES if name.split("-")[0] in ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")]


def steps(model: Any, *, drafts: int = 3, lengths: tuple[int, ...] = (9, 5), blocks: int = 4) -> list[torch.Tensor]:
    """Everything that an executor gives in a prefill and some blocks whose rows advance by different amounts."""
    batch = ragged_batch(lengths, "lr"[: len(lengths)])
    prompts = align_prompts(batch.input_ids, batch.attention_mask, vocabulary=VOCABULARY)
    executor = EagerExecutor(model, prompts, max_new_tokens=16, num_draft_tokens=drafts)
    found = []
    with torch.inference_mode():
        states = executor.prefill(num_offsets=drafts + 1)
        positions, places = list(prompts.lengths), [0] * len(lengths)
        for index in range(blocks):
            logits = executor.logits(states.last_hidden_BTD)
            last_B = random_tokens(len(lengths), seed=index)
            found += [logits, *states.future_hidden]
            found.append(executor.draft(states, places, last_B=last_B, count=drafts).double())
            block = torch.cat(
                (last_B[:, None], random_tokens(len(lengths) * drafts, seed=50 + index).view(-1, drafts)), 1
            )
            states = executor.block(block, positions, num_offsets=drafts + 1)
            places = [(index + row) % (drafts + 1) for row in range(len(lengths))]
            positions = [position + place + 1 for position, place in zip(positions, places, strict=True)]
    found += [layer.keys for layer in executor.cache.layers]
    return found


def gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference."""
    assert len(left) == len(right)
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", LEAN)
def test_every_family_gives_what_its_own_layers_give(family: str, pack: bool):
    model = tiny_model(family, num_future_tokens=4)
    assert gap(steps(model), steps(LeanModel(model, pack=pack))) < 2e-5


@pytest.mark.parametrize("family", ["llama-gqa-tied", "olmo2", "qwen3"])
def test_in_float64_only_summation_order_differs(family: str):
    model = tiny_model(next(name for name in LEAN if name.startswith(family)), num_future_tokens=3, dtype=torch.float64)
    # the families compute norms in float32 whatever the model's precision
    assert gap(steps(model, drafts=2), steps(LeanModel(model), drafts=2)) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_of_every_architecture_run_on_lean_layers(architecture: str):
    model = head_model(architecture, perturb=0.05)
    assert gap(steps(model), steps(LeanModel(model))) < 5e-5


@pytest.mark.parametrize("family", LEAN)
def test_checkpoints_are_admitted_by_a_float32_run_of_their_layers(family: str):
    model = tiny_model(family, num_future_tokens=3, dtype=torch.bfloat16)
    assert why_not_lean(model) is None
    with torch.inference_mode():
        assert largest_gap(model) < 1e-5
    assert isinstance(lean_model(model), LeanModel)


def test_a_layer_that_does_something_else_is_not_admitted():
    model = tiny_model("llama", num_future_tokens=2)
    model.base.model.layers[1].self_attn.scaling *= 1.01
    assert isinstance(lean_model(model), LeanModel)  # the scale is read from the module
    other = tiny_model("llama", num_future_tokens=2)
    forward = other.base.model.layers[1].mlp.act_fn.forward
    other.base.model.layers[1].mlp.forward = lambda x: 1.001 * forward(x).sum(-1, keepdim=True).expand_as(x)
    reason = lean_model(other)
    assert isinstance(reason, str)
    assert "differ from the family's own" in reason


@pytest.mark.parametrize(("family", "said"), [("gemma3", "not for gemma3_text"), ("gpt2", "not for gpt2")])
def test_families_without_a_lean_block_say_so(family: str, said: str):
    name = next(name for name in FAMILIES if name.startswith(family))
    reason = lean_model(tiny_model(name, num_future_tokens=2))
    assert isinstance(reason, str)
    assert said in reason


def test_changed_weights_are_read_again():
    model = tiny_model("llama", num_future_tokens=2)
    first = lean_model(model)
    assert lean_model(model) is first
    with torch.no_grad():
        model.base.lm_head.weight.mul_(2)
    second = lean_model(model)
    assert second is not first
    assert gap(steps(model, drafts=1), steps(second, drafts=1)) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 17])
def test_fused_products_are_the_single_ones_side_by_side(dtype: torch.dtype, rows: int):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(48, outputs, bias=True).to(dtype) for outputs in (32, 16, 16)]
    assert can_pack(linears[0].weight)
    x = torch.randn(1, rows, 48, dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([linear(x) for linear in linears], dim=-1)
        found = FusedLinear(linears, pack=True)(x)
    torch.testing.assert_close(found, expected)
