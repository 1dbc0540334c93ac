"""A Hugging Face tokenizer from a SentencePiece `tokenizer.model`, as Llama 1 and 2 ship it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
_BPE = 2  # TrainerSpec.ModelType.BPE


def complete_tokenizer(folder: Path) -> tuple[str, ...]:
    """Write tokenizer.json beside a tokenizer.model that stands alone: without it, reading needs sentencepiece.

    Returns:
        Notes: what was made, or why it could not be.
    """
    path = folder / MODEL_FILE
    if not path.is_file() or (folder / JSON_FILE).exists():
        return ()
    try:
        tokenizer = llama_tokenizer(path)
    except ValueError as error:
        return (f"{MODEL_FILE} travelled along, but no {JSON_FILE} could be made from it ({error})",)
    tokenizer.save_pretrained(folder)
    return (f"{JSON_FILE} was made from {MODEL_FILE}",)


def llama_tokenizer(path: Path) -> Any:
    """The Llama tokenizer of a SentencePiece BPE model; it puts bos in front, as the released models were trained.

    Merges are ranked by the pieces' ids, which a BPE model has in the order in which it learned them.

    Raises:
        ValueError: another file, or a model of another kind.
    """
    try:
        proto: Any = import_protobuf().ModelProto()
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf may be absent, and its own errors have no common base
        raise ValueError("it is not a SentencePiece model") from error
    if not proto.pieces or proto.trainer_spec.model_type != _BPE:
        raise ValueError("it is not a SentencePiece BPE model")
    vocabulary = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    special = {name: _special(proto, getattr(proto.trainer_spec, f"{name}_id")) for name in ("unk", "bos", "eos")}
    merges = generate_merges(vocabulary, None)
    tokens = {f"{name}_token": piece for name, piece in special.items() if piece is not None}
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, add_eos_token=False, **tokens)


def _special(proto: Any, token: int) -> str | None:
    return str(proto.pieces[token].piece) if 0 <= token < len(proto.pieces) else None
