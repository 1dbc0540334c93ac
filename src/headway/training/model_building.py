"""From configuration to model: the shape, then the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig

from headway.data.tokenizers import vocabulary_size
from headway.errors import ConfigError
from headway.heads.options import options_from
from headway.model.base_folder import read_base_config
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import PAPER_SIZES, feed_forward_width
from headway.training.config import TrainConfig
from headway.training.fields import nearest
from headway.training.loss_options import weight_plan

# A context that fits a few training rows: positions beyond the training length are never trained.
_POSITIONS_PER_TRAINING_LENGTH = 4


def multi_token_config(config: TrainConfig) -> MultiTokenConfig:
    """What is added to the base."""
    return MultiTokenConfig(
        num_future_tokens=config.num_future_tokens,
        offset_weights=_saved_weights(config),
        loss_chunk_tokens=config.loss_chunk_tokens,
        # a pretrained base has something for heads to start from
        head_init="fresh" if config.init_from is None else "copy",
        heads=config.heads,
        auxiliary=config.auxiliary,
        auxiliary_weight=config.auxiliary_weight,
        order_window=config.order_window,
        register_distance=config.register_distance,
        **asdict(options_from(config)),
    )


def _saved_weights(config: TrainConfig) -> tuple[float, ...] | None:
    """The weights at full strength, for whoever trains the saved model on; None where all are 1 and none were given."""
    weights = weight_plan(config).weights
    if len(weights) != config.num_future_tokens:
        return None
    return config.offset_weights if set(weights) == {1.0} else weights


def fresh_model(config: TrainConfig, shape: Any) -> MultiTokenLM:
    """The model of a run with weights as the family draws them.

    Args:
        config: of the run.
        shape: from `base_config`.
    """
    # a pretrained base keeps its layers, heads come on top of them
    shorten = config.shorten_trunk and config.init_from is None
    return MultiTokenLM.from_config(shape, multi_token_config(config), shorten_trunk=shorten)


def base_config(config: TrainConfig, tokenizer: Any) -> Any:
    """The Hugging Face configuration of the whole depth: `num_hidden_layers` counts the head layers.

    With `init_from` it is that of the pretrained base, heads not counted.

    Args:
        config: gives the shape by `size`, `base_config`, `init_from` or `hidden_size`.
        tokenizer: gives the vocabulary and the special ids.

    Raises:
        ConfigError: no such size or folder, or a vocabulary too small for the tokenizer.
    """
    vocabulary = vocabulary_size(tokenizer)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    positions = config.max_positions or _POSITIONS_PER_TRAINING_LENGTH * config.sequence_length
    if config.init_from is not None:
        return _checked_shape(config, "init_from", vocabulary)
    if config.base_config is not None:
        shape = _checked_shape(config, "base_config", vocabulary)
        for name, value in special.items():
            setattr(shape, name, value)
        return shape
    if config.size is not None:
        if config.size not in PAPER_SIZES:
            raise ConfigError(f"unknown size {config.size!r}; {nearest(config.size, PAPER_SIZES)} (Table S14)")
        size = PAPER_SIZES[config.size]
        width, layers, heads = size.dim, size.layers, size.heads
    else:
        # TrainConfig has checked that all three are given.
        width, layers, heads = cast(tuple[int, int, int], (config.hidden_size, config.num_layers, config.num_heads))
    if heads % (config.num_kv_heads or heads):
        raise ConfigError(
            f"num_kv_heads={config.num_kv_heads} must divide the {heads} attention heads of size={config.size}; "
            f"change it"
        )
    return AutoConfig.for_model(
        config.family,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_kv_heads or heads,
        head_dim=width // heads,
        intermediate_size=config.intermediate_size or feed_forward_width(width),
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie_embeddings,
        # Mistral's default is a window of 4096; rows are short and the saved model should not forget.
        **({"sliding_window": None} if config.family == "mistral" else {}),
        **special,
    )


def _checked_shape(config: TrainConfig, field: str, vocabulary: int) -> Any:
    folder = Path(str(getattr(config, field)))
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{field}={folder} cannot be read: it has no config.json; name a folder of a Hugging Face model"
        )
    try:
        shape = read_base_config(folder)
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{field}={folder} cannot be read as a Hugging Face configuration: {detail}; name a folder with a "
            "config.json"
        ) from error
    if shape.vocab_size < vocabulary:
        raise ConfigError(
            f"{field}={folder} has vocab_size={shape.vocab_size}, tokenizer={config.tokenizer_name} needs "
            f"{vocabulary}; raise vocab_size in the file or choose its own tokenizer"
        )
    limit = getattr(shape, "max_position_embeddings", config.sequence_length)
    wanted = config.max_positions or config.sequence_length
    if limit < wanted:
        raise ConfigError(
            f"{field}={folder} allows {limit} positions, sequence_length={config.sequence_length} (or "
            f"max_positions) needs {wanted}; raise max_position_embeddings in the file or shorten the rows"
        )
    return shape
