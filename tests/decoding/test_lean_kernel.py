"""The C++ kernel on each set of instructions of this processor: right, and a row's bits do not depend on other rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding_cases import new_tokens, ragged_batch
from head_cases import head_model
from headway.decoding.cache import RaggedCache
from headway.decoding.lean import native, pages
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.few_rows import FewRows
from headway.decoding.lean.integers import Quantizer
from headway.decoding.lean.layer import LeanLayer
from headway.decoding.lean.linear import FusedLinear
from headway.decoding.lean.markov import LeanMarkov
from headway.decoding.lean.model import LeanModel
from headway.decoding.lean.pages import move_to_huge_pages
from headway.decoding.lean.passes import LeanPass
from headway.decoding.masks import ChainMasks, additive_mask
from headway.decoding.prompts import align_prompts
from headway.errors import DecodingError
from headway.functional.rotary import signed_sine
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import VOCABULARY, random_tokens, tiny_base, tiny_model

LEVELS = {"x86-64-v3": "avx2", "x86-64-v4": "avx512f", "native": "avx2"}
"""Architecture as the compiler calls it -> a flag that the processor has to have."""


needs_huge_pages = pytest.mark.skipif(not pages._allowed(), reason="the system has no huge pages to offer")


def flags() -> set[str]:
    """Of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


@pytest.fixture(params=LEVELS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel compiled for one architecture; quickly, where it is not the one that is used."""
    if native._compiler() is None or LEVELS[request.param] not in flags():
        pytest.skip(f"no C++ compiler, or not a processor of {request.param}")
    if request.param != "native":
        quick = ("-O1", f"-march={request.param}", *native.FLAGS[2:])
        monkeypatch.setattr(native, "FLAGS", quick)
    native.forget()
    assert native.library() is not None
    yield native.instructions()
    native.forget()


def a_layer(
    dtype: torch.dtype, *, family: str = "qwen3", window: int | None = None, width: int = 8
) -> tuple[LeanLayer, Any]:
    """A random layer with grouped queries, and its model; heads of qwen3 may have another width than 8."""
    base = tiny_base(family, dtype=dtype, **({} if width == 8 else {"head_dim": width}))
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=2))
    return LeanLayer(model.family.layers[1], window=window, way="kernel"), model


def run_block(
    layer: LeanLayer,
    model: Any,
    hidden_BMD: torch.Tensor,
    cache: RaggedCache,
    starts: list[int],
    *,
    window: int | None,
    by_torch: bool = False,
    by_slots: bool = False,
) -> torch.Tensor:
    """A block whose rows begin at different positions."""
    positions = hidden_BMD.shape[1]
    slots_BM = torch.tensor(starts)[:, None] + torch.arange(positions)
    cache.begin_ragged(slots_BM, first=min(starts), end=max(starts) + positions)
    view = cache.views[window]
    table = torch.arange(64)[None]
    cos, sin = model.family.decoder.rotary_emb(hidden_BMD[:1, :1], table)
    mask = additive_mask(
        slots_BM, torch.arange(view.start, view.start + view.length), window=window, dtype=hidden_BMD.dtype
    )
    seen = ChainMasks(lambda _: mask) if by_slots else mask
    run = LeanPass((cos[0].contiguous(), signed_sine(sin[0])), slots_BM, {window: seen}, cache)
    call = layer.by_torch if by_torch else layer
    return call(hidden_BMD, run, cache_index=0)


def filled(batch: int, window: int | None, dtype: torch.dtype, width: int = 8) -> RaggedCache:
    """A cache of one layer with random keys and values."""
    cache = RaggedCache([window], batch=batch, capacity=48, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(batch, 2, 48, width, generator=generator).to(dtype) for _ in range(2))
    cache.layers[0].lazy_initialization(keys, values)
    cache.layers[0].keys.copy_(keys)
    cache.layers[0].values.copy_(values)
    return cache


@pytest.mark.parametrize(
    ("family", "width", "window"),
    [
        ("qwen3", 8, None),
        ("qwen2", 8, 6),
        ("phi3", 8, None),
        ("llama-gqa-tied", 8, 6),
        ("qwen3", 64, 6),
        ("qwen3", 80, 6),
    ],
)
def test_a_layer_by_the_kernel_is_the_layer_by_torch(family: str, width: int, window: int | None, instructions: str):
    layer, model = a_layer(torch.float32, family=family, window=window, width=width)
    assert layer.weights is not None
    hidden_BMD = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    caches = [filled(3, window, torch.float32, width) for _ in range(2)]
    starts = [19, 30, 7]
    with torch.inference_mode():
        found, expected = (
            run_block(layer, model, hidden_BMD, cache, starts, window=window, by_torch=by_torch)
            for cache, by_torch in zip(caches, (False, True), strict=True)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for kept, known in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(kept.keys, known.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.values, known.values, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_a_layer_is_as_near_to_float32_as_by_torch(instructions: str):
    narrow, model = a_layer(torch.bfloat16)
    hidden_BMD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    starts = [21, 9]
    with torch.inference_mode():
        found, by_torch = (
            run_block(narrow, model, hidden_BMD, filled(2, None, torch.bfloat16), starts, window=None, by_torch=slow)
            for slow in (False, True)
        )
        wide = LeanLayer(model.float().family.layers[1], window=None, way="kernel")
        cache = filled(2, None, torch.bfloat16)
        cache.layers[0].allocate(cache.layers[0].keys.float(), cache.layers[0].values.float())
        truth = run_block(wide, model, hidden_BMD.float(), cache, starts, window=None)
    error, reference = ((result.float() - truth).abs().max() for result in (found, by_torch))
    assert error <= 1.5 * reference


@pytest.mark.parametrize(("width", "window"), [(8, None), (8, 6), (64, 6), (80, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_is_the_same_bits_alone_and_in_a_block(
    dtype: torch.dtype, window: int | None, width: int, instructions: str
):
    layer, model = a_layer(dtype, window=window, width=width)
    hidden_BMD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    starts = [19, 26]
    with torch.inference_mode():
        together = run_block(layer, model, hidden_BMD, filled(2, window, dtype, width), starts, window=window)
        cache = filled(2, window, dtype, width)
        for place in range(7):
            at = [start + place for start in starts]
            alone = run_block(layer, model, hidden_BMD[:, place : place + 1], cache, at, window=window)
            assert torch.equal(alone[:, 0], together[:, place])
        single = run_block(
            layer, model, hidden_BMD[1:], one_row(filled(2, window, dtype, width), 1), [26], window=window
        )
        assert torch.equal(single[0], together[1])


def one_row(cache: RaggedCache, row: int) -> RaggedCache:
    """The same with one row of the batch."""
    window = next(iter(cache.views))
    alone = RaggedCache([window], batch=1, capacity=48, device=torch.device("cpu"))
    keys, values = cache.layers[0].keys[row : row + 1], cache.layers[0].values[row : row + 1]
    alone.layers[0].lazy_initialization(keys, values)
    alone.layers[0].keys.copy_(keys)
    alone.layers[0].values.copy_(values)
    return alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 70, 1376])
def test_a_row_of_a_product_is_the_same_bits_whatever_stands_beside_it(
    dtype: torch.dtype, inputs: int, instructions: str
):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, 130).to(dtype)
    fused = FusedLinear([linear], way="kernel")
    x = torch.randn(20, inputs, dtype=dtype)
    alone = torch.cat([fused(row[None]) for row in x])
    assert all(torch.equal(fused(x[:rows]), alone[:rows]) for rows in range(1, 21))
    with torch.inference_mode():
        torch.testing.assert_close(alone, torch.nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 70, 4500])
def test_int8_products_are_those_of_the_rounded_weights_and_rows_do_not_matter(
    dtype: torch.dtype, inputs: int, instructions: str
):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, 70).to(dtype)
    rounded = Quantizer()(linear)
    fused = FusedLinear([linear], way="int8")
    x = torch.randn(9, inputs, dtype=dtype)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(x.double(), rounded.dequantized(torch.float64), linear.bias.double())
        found = fused(x)
        tolerance = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(found.double(), exact, **tolerance)
        assert all(torch.equal(fused(row[None])[0], found[place]) for place, row in enumerate(x))
        # Half a step of the scale is the most that a weight is moved.
        moved = (rounded.dequantized(torch.float32) - linear.weight.float()).abs()
        assert bool((moved <= 0.51 * rounded.scales_O[:, None]).all())


def test_a_model_in_int8_is_near_to_its_own_and_its_text_with_drafts_is_the_text_without(instructions: str):
    model = head_model("linear-tap-markov")
    ids = random_tokens(1, 9)
    with torch.inference_mode():
        own, rounded = (steps_of(LeanModel(model, way=way), ids) for way in ("kernel", "int8"))
    assert 0 < float((own - rounded).abs().max()) < 0.1 * float(own.abs().max())
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "executor": "lean", "weights": "int8"}
    options["return_dict_in_generate"] = True
    drafted, plain = (model.generate(ids, num_draft_tokens=count, **options) for count in (3, 0))
    assert torch.equal(drafted.sequences, plain.sequences)
    assert "int8" in drafted.note
    assert not drafted.lossless


def steps_of(lean: LeanModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits after a prompt and a block."""
    prompts = align_prompts(ids, None, vocabulary=VOCABULARY)
    run = LeanExecutor(lean, prompts, max_new_tokens=8, num_draft_tokens=3)
    first = run.logits(run.prefill(num_offsets=1).last_hidden_BTD)
    second = run.logits(run.block(random_tokens(1, 4), [ids.shape[1]], num_offsets=1).last_hidden_BTD)
    return torch.cat((first, second), dim=1)


def test_int8_weights_are_refused_without_the_lean_executor():
    with pytest.raises(DecodingError, match="weights='int8' needs executor='lean'"):
        head_model("linear-tap-markov").generate(random_tokens(1, 4), max_new_tokens=2, weights="int8")


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("positions", [1, 4])
def test_a_chain_that_is_told_by_its_slots_sees_what_its_mask_says(
    window: int | None, positions: int, instructions: str
):
    layer, model = a_layer(torch.float32, window=window)
    hidden_BMD = torch.randn(3, positions, model.config.hidden_size)
    starts = [9, 2, 20]
    with torch.inference_mode():
        found, expected, by_torch = (
            run_block(layer, model, hidden_BMD, filled(3, window, torch.float32), starts, window=window, **how)
            for how in ({"by_slots": True}, {}, {"by_slots": True, "by_torch": True})
        )
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, by_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_takes_the_likeliest_token_after_the_one_before(dtype: torch.dtype, instructions: str):
    model = head_model("transformer-markov").to(dtype)
    markov = LeanMarkov(model.heads.markov)
    logits_KBV = torch.randn(3, 2, model.heads.markov.to_logits.out_features).to(dtype)
    with torch.inference_mode():
        previous_B, expected = torch.tensor([4, 11]), []
        for logits_BV in logits_KBV:
            previous_B = (logits_BV + model.heads.markov(previous_B)).argmax(-1)
            expected.append(previous_B)
        assert torch.equal(markov.likeliest(logits_KBV, torch.tensor([4, 11])), torch.stack(expected, dim=1))
        assert torch.equal(markov(previous_B[:, None])[:, 0], markov(previous_B))
        torch.testing.assert_close(markov(previous_B), model.heads.markov(previous_B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["transformer", "linear", "linear-tap-markov"])
def test_a_draft_in_one_call_is_the_draft_in_steps(architecture: str, dtype: torch.dtype, instructions: str):
    model = head_model(architecture).to(dtype)
    lean = LeanModel(model, way="kernel")
    generator = torch.Generator().manual_seed(3)
    width, columns, last_B = model.config.hidden_size, [2, 0], torch.tensor([4, 11])
    future = torch.randn(2, 2, 3, width, generator=generator).to(dtype)
    with torch.inference_mode():
        previous_B, expected = last_B, []
        for offset, hidden_BMD in enumerate(future, start=2):
            hidden_BD = torch.stack([hidden_BMD[row, column] for row, column in enumerate(columns)])
            previous_B = lean.offset_logits(hidden_BD, offset=offset, previous=previous_B).argmax(-1)
            expected.append(previous_B)
        assert lean.likeliest is not None
        assert torch.equal(lean.likeliest(list(future), columns, last_B), torch.stack(expected, dim=1))


def test_heads_that_have_unembeddings_of_their_own_are_drafted_in_steps():
    assert LeanModel(head_model("medusa"), way="kernel").likeliest is None


def test_products_of_one_input_with_several_matrices_are_those_one_by_one(instructions: str):
    weights = [(torch.randn(12, 37), torch.randn(12)) for _ in range(3)]
    x_RD, both_KRO, single_RO = torch.randn(5, 37), torch.empty(2, 5, 12), torch.empty(5, 12)
    FewRows(weights, torch.float32)(x_RD, both_KRO)
    for weight, found_RO in zip(weights, both_KRO, strict=False):
        FewRows([weight], torch.float32)(x_RD, single_RO)
        assert torch.equal(found_RO, single_RO)
        torch.testing.assert_close(found_RO, torch.nn.functional.linear(x_RD, *weight))


@pytest.mark.parametrize("architecture", ["transformer", "linear-tap-markov"])
def test_bfloat16_text_with_drafts_is_the_text_without(architecture: str, instructions: str):
    model = head_model(architecture).bfloat16()
    batch = ragged_batch((9, 5), "lr")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 40, "return_dict_in_generate": True}
    columns = batch.input_ids.shape[1]
    drafted, plain = (
        new_tokens(model.generate(batch.input_ids, executor="lean", num_draft_tokens=count, **options), columns)
        for count in (3, 0)
    )
    assert drafted == plain


@needs_huge_pages
def test_moved_weights_are_the_same_model(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama-gqa-tied", num_future_tokens=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(pages, "HUGE_PAGE", 4096)  # so that the tiny model is worth moving
    assert move_to_huge_pages(model) == move_to_huge_pages(model) > 0
    assert model.base.lm_head.weight is model.base.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    out = model(random_tokens(2, 9), labels=random_tokens(2, 9))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.base.parameters())


def test_the_executor_says_which_instructions_it_uses(instructions: str):
    assert instructions.startswith(("AMX", "AVX"))
    assert LeanModel(tiny_model("llama", num_future_tokens=2)).description.startswith("C++ kernel, AVX")
