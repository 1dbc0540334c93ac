"""The plain part of a llama-like model as a GGUF file: what llama.cpp decodes, one token per forward.

llama.cpp's own converter (`headway.convert.gguf_ready`) takes tokenizers that it knows. This export takes models of bytes, whose
vocabulary it writes as llama.cpp's byte tokens, and models of any tokenizer for callers who feed token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from headway.convert.gguf_file import Precision, Unsigned, Value, write_gguf
from headway.convert.lazy_model import LazyTensor
from headway.data.tokenizers import is_byte_tokenizer
from headway.errors import IncompatibleModelError

FAMILIES = ("llama", "mistral")
_SPACE = 0x20
_NORMAL, _CONTROL, _BYTE = 1, 3, 6
_FILE_TYPES: dict[Precision, int] = {"f32": 0, "bf16": 32, "q8_0": 7}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def export_gguf(base: Any, tokenizer: Any, file: Path, *, name: str, precision: Precision) -> None:
    """Write the file of a model in memory.

    Args:
        base: a Hugging Face causal LM of `FAMILIES`; heads beside it are left out.
        tokenizer: the model's. Of bytes: llama.cpp reads and writes text with the file; any other: the file has no vocabulary
            and takes token ids only.
        file: to write.
        name: of the model, in the file.
        precision: of the matrices.

    Raises:
        IncompatibleModelError: another family, or an option of the family that this export does not know.
        ConfigError: rows that Q8_0 cannot hold.
    """
    state = {
        own: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for own, tensor in base.state_dict().items()
    }
    write_model(base.config, state, tokenizer, file, name=name, precision=precision)


def write_model(
    config: Any, state: Mapping[str, LazyTensor], tokenizer: Any, file: Path, *, name: str, precision: Precision
) -> None:
    """As `export_gguf`, from a configuration and a state dict, of which one tensor is read at a time."""
    check_exportable(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    prefix = "llama"
    metadata: dict[str, Value] = {
        "general.architecture": prefix,
        "general.name": name,
        "general.file_type": Unsigned(_FILE_TYPES[precision]),
        f"{prefix}.vocab_size": Unsigned(config.vocab_size),
        f"{prefix}.context_length": Unsigned(config.max_position_embeddings),
        f"{prefix}.embedding_length": Unsigned(config.hidden_size),
        f"{prefix}.block_count": Unsigned(config.num_hidden_layers),
        f"{prefix}.feed_forward_length": Unsigned(config.intermediate_size),
        f"{prefix}.attention.head_count": Unsigned(heads),
        f"{prefix}.attention.head_count_kv": Unsigned(kv_heads),
        f"{prefix}.attention.key_length": Unsigned(width),
        f"{prefix}.attention.value_length": Unsigned(width),
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.rope.dimension_count": Unsigned(width),
        f"{prefix}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **_vocabulary(tokenizer, config.vocab_size),
    }
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for own, theirs in _LAYER.items():
            weight = state[f"model.layers.{layer}.{own}"]
            if theirs in ("attn_q.weight", "attn_k.weight"):
                weight = _interleaved_lazily(weight, heads if theirs == "attn_q.weight" else kv_heads)
            tensors[f"blk.{layer}.{theirs}"] = weight
    write_gguf(file, metadata, tensors, precision=precision)


def interleaved(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys for rotary embeddings of neighbouring pairs, from those of halves as Hugging Face has them."""
    rows = weight_OI.shape[0] // heads
    return weight_OI.reshape(heads, 2, rows // 2, -1).transpose(1, 2).reshape(weight_OI.shape)


def _interleaved_lazily(weight: LazyTensor, heads: int) -> LazyTensor:
    return replace(weight, read=lambda: interleaved(weight.read(), heads))


def check_exportable(config: Any) -> None:
    """Refuse what the file could not say.

    Raises:
        IncompatibleModelError: another family, or an option of the family that this export does not know.
    """
    if config.model_type not in FAMILIES:
        raise IncompatibleModelError(
            f"the GGUF export knows {' and '.join(FAMILIES)} models: got {config.model_type!r}; convert --to hf and use "
            f"llama.cpp's own converter"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    known = (
        ("rope_type", rope, "default"),
        ("attention_bias", bool(getattr(config, "attention_bias", False)), False),
        ("mlp_bias", bool(getattr(config, "mlp_bias", False)), False),
        ("hidden_act", config.hidden_act, "silu"),
    )
    for option, value, wanted in known:
        if value != wanted:
            raise IncompatibleModelError(
                f"the GGUF export knows {option}={wanted!r} only: got {value!r}; convert --to hf and use llama.cpp's own "
                f"converter"
            )


def _vocabulary(tokenizer: Any, size: int) -> dict[str, Value]:
    if not is_byte_tokenizer(tokenizer):
        return {"tokenizer.ggml.model": "no_vocab"}
    # llama.cpp writes spaces as U+2581 before it looks tokens up, so the byte 0x20 goes by that name.
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens[_SPACE] = "\u2581"
    kinds = [_BYTE] * 256
    kinds[_SPACE] = _NORMAL
    names = {tokenizer.eos_token_id: "</s>", tokenizer.pad_token_id: "<pad>"}
    tokens += [names.get(number, f"<unused{number}>") for number in range(256, size)]
    kinds += [_CONTROL] * (size - 256)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": Unsigned(tokenizer.eos_token_id),
        "tokenizer.ggml.eos_token_id": Unsigned(tokenizer.eos_token_id),
        "tokenizer.ggml.padding_token_id": Unsigned(tokenizer.pad_token_id),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
