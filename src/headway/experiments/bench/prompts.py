"""Prompts of a benchmark: texts, JSON lines, Spec-Bench, library code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headway.data.sources import standard_library
from headway.data.split import split_by_group
from headway.errors import DataError
from headway.experiments.bench.generation import PromptBatch
from headway.experiments.demo.corpus import held_out_prompts
from headway.experiments.demo.options import DemoOptions

FIELDS = ("turns", "prompt", "question", "text")
"""Fields of a JSON line that are tried in turn; of Spec-Bench's "turns" the first is taken."""

_BYTES_PER_TOKEN = 8

Encode = Callable[[bytes], list[int]]


@dataclass(frozen=True)
class BenchPrompts:
    """What is continued.

    Attributes:
        source: in words.
        prompts: token ids.
        texts: the prompts with what really follows them, where it is known: for acceptance along real text.
    """

    source: str
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]


def read_prompts(
    file: Path | None, encode: Encode, *, count: int, prompt_tokens: int, new_tokens: int, field: str | None
) -> BenchPrompts:
    """Prompts of a file, or of held-out packages of the running interpreter's standard library.

    Args:
        file: JSON lines where its name ends in .jsonl, else a text; None for the standard library.
        encode: token ids of bytes.
        count: prompts wanted; of JSON lines, evenly spaced ones.
        prompt_tokens: length of a prompt; shorter JSON lines stay as they are.
        new_tokens: that will be generated: so much text behind a prompt is kept.
        field: of a JSON line; None for the first of `FIELDS` that it has.

    Raises:
        DataError: a file that cannot be read, holds too little, or lacks the field.
    """
    if file is None:
        return _library(encode, count, prompt_tokens, new_tokens)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; check --prompts") from error
    if file.suffix == ".jsonl":
        texts = _spaced([_text(line, number, file, field) for number, line in _lines(data)], count)
        if not texts:
            raise DataError(f"{file} has no lines; pass another file to --prompts")
        rows = [tuple(encode(text.encode())[:prompt_tokens]) for text in texts]
        return BenchPrompts(file.name, tuple(rows), tuple(rows))
    tokens = encode(data)
    if len(tokens) < prompt_tokens:
        raise DataError(
            f"{file} has {len(tokens)} tokens, a prompt needs {prompt_tokens}; pass a longer text or lower --prompt-tokens"
        )
    last = len(tokens) - prompt_tokens
    starts = [last * number // max(1, count - 1) for number in range(count)]
    return BenchPrompts(
        file.name,
        tuple(tuple(tokens[start : start + prompt_tokens]) for start in starts),
        tuple(tuple(tokens[start : start + prompt_tokens + new_tokens]) for start in starts),
    )


def prompt_batches(
    prompts: Sequence[Sequence[int]], *, batch: int, pad_token_id: int, device: Any
) -> list[PromptBatch]:
    """Batches of exactly `batch` rows; the last one is filled up with the first prompts again.

    Args:
        prompts: token ids.
        batch: rows.
        pad_token_id: fills short prompts on the left; the mask says so.
        device: of the tensors.
    """
    groups = -(-len(prompts) // batch)
    rows = [list(prompts[index % len(prompts)]) for index in range(groups * batch)]
    made = []
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        width = max(map(len, group))
        made.append(
            PromptBatch(
                torch.tensor([[pad_token_id] * (width - len(row)) + row for row in group], device=device),
                torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=device),
            )
        )
    return made


def _library(encode: Encode, count: int, prompt_tokens: int, new_tokens: int) -> BenchPrompts:
    config = DemoOptions().training_config()
    held_out = split_by_group(
        standard_library(), held_out_fraction=config.held_out_fraction, seed=config.split_seed
    ).held_out
    size = (prompt_tokens + new_tokens) * (_BYTES_PER_TOKEN if len(encode(b"return")) < 6 else 1)
    chosen = held_out_prompts(held_out, count=count, prompt_bytes=size)
    texts = [tuple(encode(bytes(prompt.tokens))[: prompt_tokens + new_tokens]) for prompt in chosen]
    return BenchPrompts(
        "packages of the standard library that the demo's split holds out",
        tuple(text[:prompt_tokens] for text in texts),
        tuple(texts),
    )


def _lines(data: bytes) -> list[tuple[int, bytes]]:
    return [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]


def _text(line: bytes, number: int, file: Path, field: str | None) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number}: not JSON ({error}); --prompts takes one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}, line {number}: not an object; --prompts takes one object per line")
    name = field or next((known for known in FIELDS if known in record), None)
    value = record.get(name) if name else None
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{file}, line {number}: no text in the field {name or ' or '.join(FIELDS)!r} (it has "
            f"{', '.join(map(str, record)) or 'none'}); name one with --field"
        )
    return value


def _spaced(texts: list[str], count: int) -> list[str]:
    wanted = min(count, len(texts))
    return [texts[number * len(texts) // wanted] for number in range(wanted)]
