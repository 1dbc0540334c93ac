"""Model folders that the commands are tried on: random, constant, plain; of bytes and of text."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from headway.cli.main import main
from headway.data.tokenizers import BYTE_EOS_ID, BYTE_PAD_ID, BYTE_VOCABULARY_SIZE, byte_tokenizer, train_bpe_tokenizer
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig

CONTEXT = 64
SHAPE: dict[str, Any] = {
    "vocab_size": BYTE_VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": BYTE_EOS_ID,
    "pad_token_id": BYTE_PAD_ID,
}


def _save(base: Any, folder: Path, tokenizer: Any, *, num_future_tokens: int | None = None) -> Path:
    if num_future_tokens is None:
        base.save_pretrained(folder)
    else:
        mtp_config = MultiTokenConfig(num_future_tokens=num_future_tokens, head_init="fresh")
        attach_heads(base, mtp_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _random_llama(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**(SHAPE | {"initializer_range": 0.2} | changes)))
    with torch.no_grad():  # a zero among random logits is never the largest: no text ends early
        base.get_output_embeddings().weight[[base.config.eos_token_id, base.config.pad_token_id]] = 0
    return base


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random byte model with n = 4: its drafts are almost never right."""
    return _save(_random_llama(0), tmp_path_factory.mktemp("bytes") / "model", byte_tokenizer(), num_future_tokens=4)


@pytest.fixture(scope="session")
def constant_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model with n = 4 that says "a" for ever, as all its heads do: every draft is right."""
    base = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SHAPE))
    with torch.no_grad():
        base.gpt_neox.final_layer_norm.weight.zero_()
        base.gpt_neox.final_layer_norm.bias.fill_(1)
        base.get_output_embeddings().weight.zero_()
        base.get_output_embeddings().weight[ord("a")] = 1
    return _save(base, tmp_path_factory.mktemp("constant") / "model", byte_tokenizer(), num_future_tokens=4)


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random byte model without heads."""
    return _save(_random_llama(1), tmp_path_factory.mktemp("plain") / "model", byte_tokenizer())


@pytest.fixture(scope="session")
def text_tokenizer() -> Any:
    """A small BPE tokenizer, whose tokens cut characters."""
    text = "The naive caf\u00e9 has 3 \u4f60\u597d signs.\n\tfor x in range(10): y += x\n" * 20
    return train_bpe_tokenizer([text.encode()], vocabulary_size=300)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, text_tokenizer: Any) -> Path:
    """A random model with n = 2 of a tokenizer that reads text."""
    base = _random_llama(2, vocab_size=300, eos_token_id=0, pad_token_id=1)
    return _save(base, tmp_path_factory.mktemp("text") / "model", text_tokenizer, num_future_tokens=2)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch):
    """Make stdout a terminal with colours, from the call on (pytest sets stdout anew before a test's body)."""

    def install(**environment: str) -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80"} | environment).items():
            monkeypatch.setenv(name, value)
        return stream

    return install


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch):
    """Give the next command these bytes on stdin."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture
def headway(capsys: pytest.CaptureFixture[str]):
    """Run the command line: status, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
