"""What stands between a plain folder and llama.cpp's `convert_hf_to_gguf.py`.

The script reads config.json, the safetensors files and the tokenizer's files. It knows an architecture by its class name, a
SentencePiece model from tokenizer.model, and a byte-level BPE from tokenizer.json; of the latter it takes merges and
compares a hash of what the tokenizer makes of a test text with a list of its own, which is not checked here.

Source: llama.cpp, convert_hf_to_gguf.py; gguf 0.19.0 (gguf.vocab.SpecialVocab, gguf.tensor_mapping).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.convert.tokenizer import JSON_FILE, MODEL_FILE
from headway.model.families import SUPPORTED_FAMILIES

_NO_ROPE = ("dynamic",)


def gguf_obstacles(folder: Path) -> tuple[str, ...]:
    """Reasons for which the script would refuse a plain folder, or make a file that llama.cpp cannot use; empty if none.

    Args:
        folder: a folder in format `hf`.
    """
    config = _json(folder / "config.json")
    reasons = []
    # The tensors of all these families have names in gguf 0.19.0 (docs/guides/convert.md).
    if config.get("model_type") not in SUPPORTED_FAMILIES:
        reasons.append(f"its family ({config.get('model_type')}) has not been checked")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") in _NO_ROPE:
        reasons.append(f"llama.cpp has no rope scaling of type {rope['rope_type']!r}")
    return (*reasons, *_of_tokenizer(folder, int(config.get("vocab_size", 0))))


def _of_tokenizer(folder: Path, rows: int) -> list[str]:
    if (folder / MODEL_FILE).is_file():
        return []
    document = _json(folder / JSON_FILE)
    if not document:
        return [f"there is neither {MODEL_FILE} nor {JSON_FILE}: a GGUF file holds its tokenizer"]
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        return [f"its tokenizer is of type {model.get('type')!r}, not BPE"]
    reasons = []
    if not model.get("merges"):
        reasons.append("its tokenizer has no merges (bytes), and llama.cpp loads no BPE without any")
    added = [int(token["id"]) for token in document.get("added_tokens") or ()]
    largest = max([*map(int, (model.get("vocab") or {}).values()), *added], default=-1)
    if largest >= rows:
        reasons.append(f"its tokenizer has ids up to {largest}, the embedding {rows} rows")
    if not (folder / "tokenizer_config.json").is_file():
        reasons.append("tokenizer_config.json is missing, without which the tokenizer's class is not known")
    return reasons


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}
