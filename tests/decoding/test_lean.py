"""The lean executor runs the same model: hidden states, drafts and caches agree with the family's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoding_cases import base_continuation, near_ties, new_tokens, ragged_batch
from head_cases import ARCHITECTURES, head_model
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean import native
from headway.decoding.lean.admission import largest_gap, lean_model, why_not_lean
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.few_rows import kernel_for
from headway.decoding.lean.linear import FusedLinear, fastest_way
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import align_prompts
from tiny_models import FAMILIES, VOCABULARY, random_tokens, tiny_model

LEAN = [name for name in FAMILIES if name.split("-")[0] in ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")]


def available(way: str) -> bool:
    """Whether this machine has such products."""
    return way != "kernel" or kernel_for(torch.zeros(1, 1)) is not None


needs_kernel = pytest.mark.skipif(not available("kernel"), reason="no C++ compiler for the kernel")
WAYS = ["plain", "packed", pytest.param("kernel", marks=needs_kernel)]


def steps(
    model: Any, *, drafts: int = 3, lengths: tuple[int, ...] = (9, 5), blocks: int = 4, executor: Any = EagerExecutor
) -> list[torch.Tensor]:
    """Everything that an executor gives in a prefill and some blocks whose rows advance by different amounts."""
    batch = ragged_batch(lengths, "lr"[: len(lengths)])
    prompts = align_prompts(batch.input_ids, batch.attention_mask, vocabulary=VOCABULARY)
    run = executor(model, prompts, max_new_tokens=16, num_draft_tokens=drafts)
    found = []
    with torch.inference_mode():
        states = run.prefill(num_offsets=drafts + 1)
        positions, places = list(prompts.lengths), [0] * len(lengths)
        for index in range(blocks):
            logits = run.logits(states.last_hidden_BTD)
            last_B = random_tokens(len(lengths), seed=index)
            found += [logits, *states.future_hidden]
            found.append(run.draft(states, places, last_B=last_B, count=drafts).double())
            block = torch.cat(
                (last_B[:, None], random_tokens(len(lengths) * drafts, seed=50 + index).view(-1, drafts)), 1
            )
            states = run.block(block, positions, num_offsets=drafts + 1)
            places = [(index + row) % (drafts + 1) for row in range(len(lengths))]
            positions = [position + place + 1 for position, place in zip(positions, places, strict=True)]
    found += [layer.keys for layer in run.cache.layers]
    return found


def gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference."""
    assert len(left) == len(right)
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", LEAN)
def test_every_family_gives_what_its_own_layers_give(family: str, way: str):
    model = tiny_model(family, num_future_tokens=4)
    assert gap(steps(model), steps(LeanModel(model, way=way))) < 2e-5


@pytest.mark.parametrize("family", ["llama-gqa-tied", "olmo2", "qwen3"])
def test_in_float64_only_summation_order_differs(family: str):
    model = tiny_model(next(name for name in LEAN if name.startswith(family)), num_future_tokens=3, dtype=torch.float64)
    # the families compute norms in float32 whatever the model's precision
    assert gap(steps(model, drafts=2), steps(LeanModel(model), drafts=2)) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_of_every_architecture_run_on_lean_layers(architecture: str):
    model = head_model(architecture, perturb=0.05)
    assert gap(steps(model), steps(LeanModel(model), executor=LeanExecutor)) < 5e-5


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
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("inputs", "rows"), [(64, 1), (64, 16), (50, 3), (96, 17), (33, 5)])
def test_fused_products_are_the_single_ones_side_by_side(dtype: torch.dtype, way: str, inputs: int, rows: int):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(inputs, outputs, bias=outputs != 65).to(dtype) for outputs in (65, 32, 3)]
    if way != "kernel":
        linears = linears[1:]  # bias everywhere or nowhere
    x = torch.randn(1, rows, inputs, dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([linear(x) for linear in linears], dim=-1)
        found = FusedLinear(linears, way=way)(x)
    torch.testing.assert_close(found, expected)


def test_without_a_compiler_other_products_are_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_compiler", lambda: None)
    native.forget()
    try:
        assert fastest_way(torch.zeros(1, 1)) == "packed"
        assert fastest_way(torch.zeros(1, 1, dtype=torch.float64)) == "plain"
        with pytest.raises(ValueError, match="no 'kernel' products"):
            FusedLinear([torch.nn.Linear(4, 4)], way="kernel")
    finally:
        native.forget()


@pytest.mark.skipif(native._compiler() is None, reason="there is no C++ compiler that could fail")
def test_a_compiler_that_fails_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("-this-is-no-flag",))
    native.forget()
    try:
        assert kernel_for(torch.zeros(1, 1)) is None
        assert "cannot be compiled, other products are used" in caplog.text
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.forget()


@pytest.mark.parametrize("architecture", ["transformer", "linear", "medusa", "sequential", "hydra", "causal"])
def test_generate_on_lean_layers_gives_the_tokens_of_plain_decoding(architecture: str):
    model = head_model(architecture)
    batch = ragged_batch((9, 5, 12), "lrl")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 24, "return_dict_in_generate": True}
    lean = model.generate(batch.input_ids, executor="lean", **options)
    assert lean.note is None
    found = new_tokens(lean, batch.input_ids.shape[1])
    expected = [base_continuation(model, row, 24) for row in batch.rows()]
    ties = near_ties(model, batch.rows(), found, expected)
    assert ties <= 1
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 2


def test_trees_and_sampling_run_on_lean_layers():
    model = head_model("transformer")
    ids = random_tokens(7)[None]
    options = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    for request in ({"tree": 6}, {"do_sample": True, "seed": 3, "top_k": 5}, {"drafts": "lookup"}):
        eager = model.generate(ids, **options, **request)
        assert torch.equal(model.generate(ids, executor="lean", **options, **request), eager)


def test_a_model_without_a_lean_form_says_so_and_runs():
    model = tiny_model("gpt2", num_future_tokens=3)
    ids = random_tokens(7)[None]
    options = {"max_new_tokens": 9, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    result = model.generate(ids, executor="lean", **options)
    assert "no lean executor: the lean block is written for" in result.note
    assert torch.equal(result.sequences, model.generate(ids, **options).sequences)


@needs_kernel
def test_one_reading_of_the_unembedding_gives_what_two_give():
    model = head_model("transformer")
    lean = LeanModel(model)
    assert gap(steps(lean, executor=LeanExecutor), steps(lean)) < 1e-5
