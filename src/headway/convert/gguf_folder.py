"""Formats `gguf` and `gguf-q8_0`: the plain model as one file for llama.cpp; written, not read.

Only models of bytes: their vocabulary is written here. Other tokenizers need merges, scores and kinds of tokens that llama.cpp's
own converter takes from a plain folder (`--to hf`, `headway.convert.gguf_ready`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from headway.convert.gguf_export import check_exportable, write_model
from headway.convert.gguf_file import Precision
from headway.convert.lazy_model import LazyModel
from headway.convert.plain_folder import PlainFolder, common_dtype
from headway.data.tokenizers import is_byte_tokenizer, load_tokenizer
from headway.errors import DataError, IncompatibleModelError

FILE = "model.gguf"


class GgufFolder:
    """See the module."""

    marker = FILE
    files = (FILE,)
    holds_heads = False
    holds_base = True
    is_hugging_face = False

    def __init__(self, precision: Literal["q8_0"] | None = None) -> None:
        """Write matrices so.

        Args:
            precision: None for the weights' own.
        """
        self.name = "gguf" if precision is None else f"gguf-{precision}"
        self._precision = precision

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `WrittenFormat.prepare`: what a plain folder would hold."""
        plain = PlainFolder().prepare(model)
        check_exportable(plain.config)
        return plain

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `WrittenFormat.write`; the folder's tokenizer becomes the file's vocabulary."""
        precision: Precision | None = self._precision
        if precision is None:
            # float16 has no place of its own here, and float32 holds its values exactly.
            precision = "bf16" if common_dtype(model.base) == torch.bfloat16 else "f32"
        tokenizer, rows = _byte_tokenizer_of(folder), int(model.config.vocab_size)
        if rows < len(tokenizer):
            raise IncompatibleModelError(
                f"the vocabulary of bytes has {len(tokenizer)} tokens, the embedding {rows} rows: export a "
                f"model with a row for each"
            )
        name = model.base_name or "model"
        write_model(model.config, model.base, tokenizer, folder / FILE, name=name, precision=precision)
        return (f"{FILE} holds matrices in {precision} and the vocabulary of bytes",)


def _byte_tokenizer_of(folder: Path) -> Any:
    fix = "convert --to hf and use llama.cpp's own convert_hf_to_gguf.py"
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise IncompatibleModelError(
            f"a GGUF file holds its tokenizer, and the source has none that can be loaded: put the model's tokenizer.json "
            f"beside it, or {fix}"
        ) from error
    if not is_byte_tokenizer(tokenizer):
        raise IncompatibleModelError(
            f"the GGUF export writes the vocabulary of bytes: got {type(tokenizer).__name__} with {len(tokenizer)} tokens; {fix}"
        )
    return tokenizer
