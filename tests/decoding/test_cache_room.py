"""The cache grows with the text and not with its limit; one that cannot fit is refused with the numbers before it begins."""

from __future__ import annotations

import os

import pytest
import torch

from decoding_cases import base_continuation, ragged_batch
from head_cases import head_model
from headway.decoding import room
from headway.decoding.cache import RaggedCache
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.executor import EagerExecutor
from headway.errors import DecodingError
from tiny_models import random_tokens, tiny_model

BATCH = ragged_batch([3, 9, 6], "lrl")


def _cache_bytes(cache):
    tensors = [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_growing_keeps_what_is_stored_and_doubles_up_to_the_capacity():
    cache = RaggedCache([None, 4], batch=2, capacity=50, device=torch.device("cpu"), initial=4)
    stored, sizes = torch.randn(2, 3, 50, 5), []
    for slot in range(50):
        cache.begin_aligned(slot, 1)
        for layer in range(2):
            keys, values = cache.update(stored[:, :, slot : slot + 1], -stored[:, :, slot : slot + 1], layer)
            first = 0 if layer == 0 else max(0, slot - 3)
            assert torch.equal(keys, stored[:, :, first : slot + 1])
            assert torch.equal(values, -keys)
        sizes.append(cache.layers[0].keys.shape[2])
    assert sorted(set(sizes)) == [4, 8, 16, 32, 50]
    with pytest.raises(DecodingError, match="the cache holds 50 slots per row, 51 are needed"):
        cache.begin_aligned(50, 1)


def test_one_long_forward_is_enough_room_for_itself():
    cache = RaggedCache([None], batch=1, capacity=100, device=torch.device("cpu"), initial=4)
    cache.begin_ragged(torch.tensor([[60, 61]]), first=60, end=62)
    cache.update(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 0)
    assert cache.allocated == cache.layers[0].keys.shape[2] == 62


def test_without_a_first_size_everything_is_there_at_once():
    cache = RaggedCache([None], batch=1, capacity=100, device=torch.device("cpu"))
    cache.begin_aligned(0, 1)
    cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    assert cache.layers[0].keys.shape[2] == 100


@pytest.mark.parametrize("architecture", ["transformer", "sequential", "anticausal"])
@pytest.mark.parametrize("tree", [None, 6])
def test_text_and_drafts_do_not_depend_on_when_the_cache_grows(architecture, tree, monkeypatch):
    model = head_model(architecture, "qwen3-sliding", dtype=torch.float64)
    options = {
        "attention_mask": BATCH.attention_mask,
        "max_new_tokens": 40,
        "tree": tree,
        "return_dict_in_generate": True,
    }
    results = []
    for first in (1, 7, 64):
        monkeypatch.setattr("headway.decoding.executor.FIRST_NEW_TOKENS", first)
        results.append(model.generate(BATCH.input_ids, **options))
    for result in results[:2]:
        assert torch.equal(result.sequences, results[2].sequences)
        assert result.acceptance.lengths == results[2].acceptance.lengths


def test_a_generation_that_ends_early_never_took_the_whole():
    model = tiny_model()
    model.base.config.max_position_embeddings = model.config.max_position_embeddings = 10**6
    prompt = random_tokens(1, 6).clamp(min=1)
    text = base_continuation(model, prompt, 30)
    caches = []
    init = EagerExecutor.__init__

    def recording(self, *args, **kwargs):
        init(self, *args, **kwargs)
        caches.append(self.cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerExecutor, "__init__", recording)
        out = model.generate(prompt, max_new_tokens=20000, eos_token_id=text[9], pad_token_id=0)
    assert out.shape[1] <= 6 + 10
    (cache,) = caches
    assert cache.capacity > 20000
    assert cache.allocated < 200
    assert _cache_bytes(cache) == 2 * len(cache.layers) * cache.allocated * 32 * 4


def test_memory_follows_the_text_within_a_factor_of_two():
    model = tiny_model()
    loop = ENGINE.start(model, random_tokens(1, 4), max_new_tokens=220)
    with decoding_context(model):
        while not loop.finished:
            loop.step()
            cache, known = loop.executor.cache, 4 + len(loop.new_tokens(0))
            assert cache.allocated <= max(4 + 64 + 8, 2 * (known + 8))


def test_a_cache_that_cannot_fit_is_refused_with_the_numbers(monkeypatch):
    model = tiny_model()
    # 3 base layers and 3 heads, keys and values, 32 wide, 4 bytes; 3 rows of 9 + 100 + 3 slots.
    needed = 6 * 2 * 32 * 4 * 3 * (9 + 100 + 3)
    options = {"attention_mask": BATCH.attention_mask, "max_new_tokens": 100}
    monkeypatch.setattr(room, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(EagerExecutor, "prefill", None)
    with pytest.raises(DecodingError) as refused:
        model.generate(BATCH.input_ids, **options)
    assert f"({needed} bytes)" in str(refused.value)
    assert f"({needed - 1} bytes) are free on cpu" in str(refused.value)
    for knob in ("max_new_tokens=99 or less", "fewer rows", "dtype", "torch.float32"):
        assert knob in str(refused.value)


@pytest.mark.parametrize("executor", ["eager", "lean"])
def test_what_the_message_recommends_fits(executor, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(room, "free_bytes", lambda device: 6 * 2 * 32 * 4 * 3 * (9 + 41 + 3) + 17)
    options = {"attention_mask": BATCH.attention_mask, "executor": executor}
    with pytest.raises(DecodingError, match="pass max_new_tokens=41 or less"):
        model.generate(BATCH.input_ids, max_new_tokens=42, **options)
    assert model.generate(BATCH.input_ids, max_new_tokens=41, **options).shape[1] == 9 + 41


def test_a_prompt_that_cannot_fit_is_said_to_be_too_long(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 5000)
    with pytest.raises(DecodingError, match="shorter prompts"):
        tiny_model().generate(random_tokens(1, 60), max_new_tokens=5)


def test_where_nobody_tells_what_is_free_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    assert tiny_model().generate(random_tokens(1, 6), max_new_tokens=5).shape[1] == 11


@pytest.mark.parametrize("family", ["llama-gqa-tied", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def test_the_bytes_foreseen_are_the_bytes_taken(family, monkeypatch):
    model = tiny_model(family)
    foreseen = []
    monkeypatch.setattr(room, "_human", lambda number: foreseen.append(number) or str(number))
    options = {"attention_mask": BATCH.attention_mask, "max_new_tokens": 20}
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_bytes", lambda device: 0)
        with pytest.raises(DecodingError):
            model.generate(BATCH.input_ids, **options)
    monkeypatch.setattr("headway.decoding.executor.FIRST_NEW_TOKENS", 10**6)
    loop = ENGINE.start(model, BATCH.input_ids, **options)
    with decoding_context(model):
        loop.step()
    assert _cache_bytes(loop.executor.cache) == foreseen[0]


def _files(tmp_path, monkeypatch, **texts):
    for name, text in texts.items():
        (tmp_path / name.replace("_", ".", 1)).write_text(text)
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)


def test_free_memory_is_what_kernel_and_container_both_leave(tmp_path, monkeypatch):
    meminfo = "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n"
    _files(tmp_path, monkeypatch, meminfo=meminfo)
    assert room.free_bytes(torch.device("cpu")) == 4000 * 1024
    stat = "anon 5\ninactive_file 300\n"
    _files(tmp_path, monkeypatch, meminfo=meminfo, memory_max="max\n", memory_current="700", memory_stat=stat)
    assert room.free_bytes(torch.device("cpu")) == 4000 * 1024
    _files(tmp_path, monkeypatch, meminfo=meminfo, memory_max="1000\n", memory_current="700", memory_stat=stat)
    assert room.free_bytes(torch.device("cpu")) == 1000 - 700 + 300


def test_without_meminfo_the_system_is_asked(tmp_path, monkeypatch):
    _files(tmp_path, monkeypatch)
    answers = {"SC_AVPHYS_PAGES": 11, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", answers.__getitem__)
    assert room.free_bytes(torch.device("cpu")) == 11 * 4096

    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert room.free_bytes(torch.device("cpu")) is None


def test_on_cuda_reserved_and_unused_memory_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert room.free_bytes(torch.device("cuda", 0)) == 1300
    assert room.free_bytes(torch.device("meta")) is None
