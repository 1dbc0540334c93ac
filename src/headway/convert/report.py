"""What a conversion did, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verification:
    """The written folder, loaded again and compared with the source.

    Attributes:
        max_abs_difference: per offset of the result, in float32 logits on random tokens; None where the source has no
            such offset and the head was drawn fresh.
        max_abs_logit: largest logit of the source, for scale.
        limit: largest difference that passes, from the model's own float32 noise.
        num_tokens: tokens compared.
        tensors_compared: tensors that were read back and compared bit for bit with what was to be written.
        missing: tensors that the written folder lacks (a folder with any is not kept).
        random: tensors of heads that were drawn at random, not taken from the source: train them.
        unchanged: tensors of heads that equal the base's last layer bit for bit: heads that were never trained.
    """

    max_abs_difference: tuple[float | None, ...]
    max_abs_logit: float
    limit: float
    num_tokens: int
    tensors_compared: int
    missing: tuple[str, ...]
    random: tuple[str, ...]
    unchanged: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What was read, what was written, and what to know about it.

    Attributes:
        source_format: read as.
        target_format: written as.
        model_type: Hugging Face family of the base.
        base_name: by which people know the base.
        source_num_future_tokens: n of the source, the next token included.
        num_future_tokens: n of what was written.
        dtype: of the weights written; several joined by commas.
        num_base_tensors: tensors of the base, a tied one counted once.
        num_head_tensors: tensors of the heads that were written.
        num_bytes: of these tensors.
        files: written, in order of name, with their bytes.
        companions: tokenizer, licence and other files that travelled along.
        left_behind: files of the source folder that did not travel.
        left_out: tensors of the source that the model does not need, with the reason.
        notes: what to know, one sentence each.
        gguf_obstacles: why llama.cpp's converter would refuse a plain folder, empty where nothing is known; None for
            formats that it does not read.
        verification: None unless asked for.
    """

    source_format: str
    target_format: str
    model_type: str
    base_name: str | None
    source_num_future_tokens: int
    num_future_tokens: int
    dtype: str
    num_base_tensors: int
    num_head_tensors: int
    num_bytes: int
    files: dict[str, int]
    companions: tuple[str, ...]
    left_behind: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    gguf_obstacles: tuple[str, ...] | None
    verification: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)
