"""Big models: however many tensors there are, a format holds one of them in memory while it writes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from head_cases import head_model
from headway.convert import safetensors_files
from headway.convert.architecture import architecture
from headway.convert.formats import EXPORT_FORMATS, MODEL_FORMATS
from headway.convert.future_tokens import with_future_tokens
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.data.tokenizers import BYTE_VOCABULARY_SIZE, byte_tokenizer
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import tiny_base

HEADS_OF = {"medusa": "medusa", "medusa-engine": "medusa", "transformers-mtp": "sequential-own-norm"}
"""Format -> the heads that it holds; else transformer heads."""


class Counter:
    """Reads that count how many of their tensors are alive at once."""

    def __init__(self) -> None:
        self.alive = self.most = self.reads = 0

    def lazy(self, tensor: torch.Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: self._read(tensor))

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        copy = tensor.detach().clone()
        weakref.finalize(copy, self._gone)
        return copy

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODEL_FORMATS)
def test_writing_holds_one_tensor(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 30_000)
    model = head_model(HEADS_OF.get(name, "transformer"), num_future_tokens=3)
    needed = architecture(model.config, model.mtp_config)
    state, heads, counter = model.base.state_dict(), model.heads.state_dict(), Counter()
    lazy = LazyModel(
        config=model.config,
        mtp_config=model.mtp_config,
        base={key: counter.lazy(state[key]) for key in needed.base},
        heads={key: counter.lazy(heads[key]) for key in needed.heads},
    )
    if name not in HEADS_OF:
        lazy = with_future_tokens(lazy, 5, head_init="copy", seed=0)
    lazy = MODEL_FORMATS[name].prepare(lazy.map(lambda tensor: tensor.to(dtype)))
    gc.collect()
    MODEL_FORMATS[name].write(lazy, tmp_path)
    # A base that stays apart is read once, for its fingerprint.
    assert counter.reads == len(lazy.tensors) + len(lazy.apart)
    assert counter.most == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_exporting_holds_one_tensor(name, dtype, tmp_path):
    base = tiny_base("llama", vocab_size=BYTE_VOCABULARY_SIZE)
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=3))
    state, heads, counter = base.state_dict(), model.heads.state_dict(), Counter()
    needed = architecture(model.config, model.mtp_config)
    lazy = LazyModel(
        config=model.config,
        mtp_config=model.mtp_config,
        base={key: counter.lazy(state[key]) for key in needed.base},
        heads={key: counter.lazy(heads[key]) for key in needed.heads},
    )
    lazy = EXPORT_FORMATS[name].prepare(lazy.map(lambda tensor: tensor.to(dtype)))
    byte_tokenizer().save_pretrained(tmp_path)
    gc.collect()
    EXPORT_FORMATS[name].write(lazy, tmp_path)
    assert counter.reads == len(lazy.tensors)
    assert counter.most == 1
