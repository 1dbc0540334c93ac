"""Long prompts are read in pieces: the same text, drafts and caches as in one forward, in memory that stays small."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decoding_cases import ragged_batch
from head_cases import ARCHITECTURES, CHANGES_BASE, IN_TURN, WITH_CACHE, head_model
from headway.decoding.engine import decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.admission import lean_model
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.model import LeanModel
from headway.decoding.masks import BlockMasks
from headway.decoding.prefill import pieces, reads_at_once
from headway.decoding.prompts import align_prompts
from headway.errors import DecodingError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import FAMILIES, VOCABULARY, random_tokens, tiny_base, tiny_model

# Rows that end in the first piece, in the middle of one, at a boundary and at the very end; longer than the windows of 6.
RAGGED = ragged_batch([3, 29, 13, 22, 1], "lrrlr")
CHUNK = 7
DRAFTS = 3


def _prefilled(model, *, chunk, executor=EagerExecutor, batch=RAGGED):
    """An executor after its prefill, what it then knows about each row's last token, and a draft after token 1."""
    prompts = align_prompts(batch.input_ids, batch.attention_mask, vocabulary=VOCABULARY)
    run = executor(model, prompts, max_new_tokens=9, num_draft_tokens=DRAFTS, prefill_chunk_tokens=chunk)
    forwards = []
    original = run._run
    run._run = lambda ids, *rest: forwards.append(ids.shape[1]) or original(ids, *rest)
    picked = []

    def pick(logits_BV, offset):
        picked.append(logits_BV)
        return torch.full_like(logits_BV[:, 0], offset, dtype=torch.long)

    with torch.inference_mode():
        states = run.prefill(num_offsets=1 + DRAFTS)
        logits_BV = run.logits(states.last_hidden_BTD)[:, 0]
        rows = prompts.batch
        last_B = torch.ones(rows, dtype=torch.long)
        run.draft_picked(states, [0] * rows, last_B=last_B, count=DRAFTS, pick=pick)
    return run, forwards, [states.last_hidden_BTD, *states.future_hidden, logits_BV, *picked]


def _largest_difference(left, right):
    assert len(left) == len(right)
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(left, right, strict=True))


def _cache_difference(run, other, lengths):
    """Over keys and values of all layers at all known positions of every row."""
    worst = 0.0
    for mine, theirs in zip(run.cache.layers, other.cache.layers, strict=True):
        assert mine.is_initialized
        assert theirs.is_initialized
        for found, wanted in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            for row, length in enumerate(lengths):
                worst = max(worst, float((found[row, :, :length] - wanted[row, :, :length]).abs().max()))
    return worst


def _both_ways(model, *, executor=EagerExecutor):
    with decoding_context(model._model if isinstance(model, LeanModel) else model):
        whole, forwards, expected = _prefilled(model, chunk=None, executor=executor)
        assert forwards == [29]
        pieced, forwards, found = _prefilled(model, chunk=CHUNK, executor=executor)
    assert forwards[:4] == [7, 7, 7, 7]
    assert max(forwards) <= CHUNK
    lengths = RAGGED.attention_mask.sum(dim=1).tolist()
    return _largest_difference(found, expected), _cache_difference(pieced, whole, lengths)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_every_family_the_states_and_caches_of_one_forward(family, attention):
    if family == "gemma2":
        attention = "eager"
    model = tiny_model(family, dtype=torch.float64)
    model.base.set_attn_implementation(attention)
    states, caches = _both_ways(model)
    # Families whose norm computes in float32 can differ by float32 roundings.
    assert states < 1e-4
    assert caches < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding", "gpt2"])
def test_float32_differs_by_its_rounding_alone(family):
    states, caches = _both_ways(tiny_model(family))
    assert states < 1e-3
    assert caches < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_give_every_kind_of_heads_the_drafts_and_caches_of_one_forward(architecture):
    states, caches = _both_ways(head_model(architecture, dtype=torch.float64))
    assert states < 1e-4
    assert caches < 1e-5


@pytest.mark.parametrize(
    "architecture", ["transformer", "causal", "sequential", "sequential-shared", "hydra", "medusa"]
)
def test_lean_layers_read_pieces_as_they_read_the_whole(architecture):
    model = head_model(architecture, "qwen3-sliding")
    lean = lean_model(model)
    assert isinstance(lean, LeanModel)
    states, caches = _both_ways(lean, executor=LeanExecutor)
    assert states < 1e-3
    assert caches < 1e-4


@pytest.mark.parametrize("architecture", sorted(WITH_CACHE & IN_TURN))
def test_the_comparison_would_notice_depths_that_do_not_store_their_pieces(architecture, monkeypatch):
    monkeypatch.setattr(EagerExecutor, "_read_on", lambda *args, **kwargs: None)
    _, caches = _both_ways(head_model(architecture, dtype=torch.float64))
    assert caches > 1e-2


def test_the_comparison_would_notice_pieces_without_their_mask(monkeypatch):
    monkeypatch.setattr(BlockMasks, "ragged", lambda self, positions: torch.zeros(()).double().expand(1, 1, 1, 1))
    states, caches = _both_ways(tiny_model(dtype=torch.float64))
    assert min(states, caches) > 1e-2


@pytest.mark.parametrize("executor", ["eager", "lean"])
@pytest.mark.parametrize("chunk", [1, 5, 28])
def test_generate_gives_the_text_of_one_forward_whatever_the_pieces(chunk, executor):
    for architecture in ("transformer", "sequential", *CHANGES_BASE):
        model = head_model(architecture, "mistral-sliding", dtype=torch.float64)
        options = {"attention_mask": RAGGED.attention_mask, "max_new_tokens": 12, "return_dict_in_generate": True}
        whole = model.generate(RAGGED.input_ids, prefill_chunk_tokens=None, **options)
        pieced = model.generate(RAGGED.input_ids, prefill_chunk_tokens=chunk, executor=executor, **options)
        assert torch.equal(pieced.sequences, whole.sequences)
        assert pieced.acceptance.lengths == whole.acceptance.lengths


def test_short_prompts_stay_one_forward_by_default(monkeypatch):
    called = []
    monkeypatch.setattr(EagerExecutor, "read_piece", lambda *args: called.append(args))
    tiny_model().generate(random_tokens(1, 200), max_new_tokens=2)
    assert called == []


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True, "all"])
def test_a_piece_has_at_least_one_token(chunk):
    with pytest.raises(DecodingError, match="prefill_chunk_tokens must be a whole number of at least 1"):
        tiny_model().generate(random_tokens(1, 4), max_new_tokens=2, prefill_chunk_tokens=chunk)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation made, caches and views of them left out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() == tensor.untyped_storage().nbytes() // max(
                1, tensor.itemsize
            ):
                self.numel = max(self.numel, tensor.numel())
        return made


def _largest(model, columns, chunk):
    prompts = align_prompts(random_tokens(1, columns), None, vocabulary=VOCABULARY)
    with decoding_context(model):
        run = EagerExecutor(model, prompts, max_new_tokens=4, num_draft_tokens=3, prefill_chunk_tokens=chunk)
        with LargestTensor() as largest:
            run.prefill(num_offsets=4)
    return largest.numel


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("mistral-sliding", "sdpa")])
def test_no_tensor_of_a_long_prompt_grows_with_the_square_of_its_length(family, attention):
    model = tiny_model(family)
    model.base.set_attn_implementation(attention)
    short, long = (_largest(model, columns, None) for columns in (128, 256))
    assert long > 3.5 * short  # in one forward something does: the mask of a window, or written-down weights
    short, long = (_largest(model, columns, 16) for columns in (128, 256))
    assert long < 2.2 * short
    # Four heads' weights of a piece are the largest there may be, and slots are allocated beyond the prompt.
    assert long <= 4 * 16 * (256 + 2 * 64)


def test_no_tensor_of_a_long_prompt_holds_logits_of_its_positions():
    base = tiny_base("llama", vocab_size=5000)
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=4))
    for chunk in (None, 16):
        assert _largest(model, 256, chunk) < 256 * 5000 // 4


def test_pieces_cover_a_prompt_once():
    for columns in range(1, 12):
        for chunk in range(1, 13):
            covered = [column for start, end in pieces(columns, chunk) for column in range(start, end)]
            assert covered == list(range(columns))


@pytest.mark.parametrize(
    ("parameters", "whole"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "llama3", "rope_theta": 1e4}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"rope_type": "longrope"}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
        ({"full_attention": {"rope_type": "linear"}, "sliding_attention": {"rope_type": "default"}}, False),
        (None, False),
    ],
)
def test_frequencies_that_follow_the_length_need_one_forward(parameters, whole):
    assert reads_at_once(SimpleNamespace(rope_parameters=parameters)) is whole
