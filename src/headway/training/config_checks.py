"""Which options of a training run exclude or need each other; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headway.errors import ConfigError
from headway.heads.options import check_options, decoder_layers, options_from
from headway.training.best import parse_figure
from headway.training.loss_options import check_loss_options

if TYPE_CHECKING:
    from headway.training.config import TrainConfig


def check_together(config: TrainConfig) -> None:
    """Refuse combinations that cannot work; every message names both fields and the way out.

    Raises:
        ConfigError: the first combination found.
    """
    _check_model(config)
    _check_data(config)
    check_loss_options(config)
    if config.warmup_steps is not None and config.warmup_fraction is not None:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} and warmup_fraction={config.warmup_fraction:g} both give "
            "the warm-up; set one of them to none"
        )
    # with epochs, the steps are known (and checked) when the text has been read
    if config.epochs is None and config.total_warmup_steps >= config.steps and config.total_warmup_steps > 0:
        raise ConfigError(
            f"warmup_steps must be fewer than steps: got warmup_steps={config.total_warmup_steps} and "
            f"steps={config.steps}; lower warmup_steps or raise steps"
        )
    if config.decay_ratio > 1:
        raise ConfigError(
            f"decay_ratio is the last learning_rate as a share of its peak: got {config.decay_ratio:g}; pass 0 to 1"
        )
    if config.optimizer != "muon":
        for name in ("adamw_learning_rate", "adamw_weight_decay"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} needs optimizer muon: got optimizer={config.optimizer}; set optimizer to "
                    f"muon or {name} to none"
                )
    if config.keep_best is not None:
        offset = parse_figure(config.keep_best).offset
        if offset > config.num_future_tokens:
            raise ConfigError(
                f"keep_best={config.keep_best} asks for offset {offset}, but the model predicts offsets up to "
                f"num_future_tokens={config.num_future_tokens}; name another figure or offset"
            )
    if config.mfu_peak not in ("auto", "measure") and not _is_above_zero(config.mfu_peak):
        raise ConfigError(
            f"mfu_peak takes auto, measure, or the peak of one device in TFLOP/s: got {config.mfu_peak!r}; correct the value"
        )
    if config.overwrite and config.resume not in ("auto", "never"):
        raise ConfigError(
            f"overwrite and resume={config.resume} exclude each other: one clears the output folder, the "
            "other continues a checkpoint; drop one of them"
        )


def _is_above_zero(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _check_model(config: TrainConfig) -> None:
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "num_heads")}
    given = [name for name in ("size", "base_config", "init_from") if getattr(config, name) is not None]
    if any(value is not None for value in shape.values()):
        given.append("hidden_size, num_layers and num_heads")
    if not given:
        raise ConfigError(
            "the model is not given: set size (such as 10M), base_config, init_from, or hidden_size, num_layers and "
            "num_heads; or start from a recipe"
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both give the model; set all but one of them to none")
    missing = [name for name, value in shape.items() if value is None]
    if given[0].startswith("hidden_size") and missing:
        raise ConfigError(
            f"hidden_size, num_layers and num_heads go together: {' and '.join(missing)} is missing; set it"
        )
    decided = config.base_config or config.init_from
    if decided is not None:
        defaults: dict[str, Any] = {
            "family": "llama",
            "num_kv_heads": None,
            "intermediate_size": None,
            "tie_embeddings": False,
        }
        if config.init_from is not None:
            defaults |= {"max_positions": None, "initialization": "family"}
        for name, default in defaults.items():
            if getattr(config, name) != default:
                raise ConfigError(
                    f"{given[0]}={decided} already decides {name}; drop {name}={getattr(config, name)} or edit the file"
                )
    if config.hidden_size is not None and config.num_heads is not None:
        if config.hidden_size % config.num_heads or (config.hidden_size // config.num_heads) % 2:
            raise ConfigError(
                f"hidden_size must be an even multiple of num_heads: got hidden_size={config.hidden_size} "
                f"and num_heads={config.num_heads}; change one of them"
            )
        if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads: got num_heads={config.num_heads} and "
                f"num_kv_heads={config.num_kv_heads}; change one of them"
            )
    options = options_from(config)
    check_options(config.heads, options)
    taken = decoder_layers(config.heads, options, num_heads=config.num_future_tokens - 1) if config.shorten_trunk else 0
    if config.num_layers is not None and taken >= config.num_layers:
        raise ConfigError(
            "num_future_tokens must be at most num_layers, which counts the head layers: got "
            f"num_future_tokens={config.num_future_tokens}, whose heads have {taken} layers, and "
            f"num_layers={config.num_layers}; lower num_future_tokens or raise num_layers"
        )


def _check_data(config: TrainConfig) -> None:
    if not config.data:
        raise ConfigError("data is empty: name at least one file or folder, or 'stdlib'")
    _ = config.corpus_spec  # refuses what its sources cannot be
    if config.sequence_length <= config.num_future_tokens:
        raise ConfigError(
            "sequence_length must be more than num_future_tokens: got "
            f"sequence_length={config.sequence_length} and num_future_tokens={config.num_future_tokens}; "
            "raise sequence_length or lower num_future_tokens"
        )
    if config.max_positions is not None and config.max_positions < config.sequence_length:
        raise ConfigError(
            f"max_positions must be at least sequence_length: got max_positions={config.max_positions} and "
            f"sequence_length={config.sequence_length}; raise max_positions"
        )
    if config.eval_every_steps is not None and config.held_out_fraction == 0 and not config.held_out:
        raise ConfigError(
            f"eval_every_steps={config.eval_every_steps} needs held-out text, but held_out_fraction=0; "
            "set eval_every_steps to none or hold something out"
        )
