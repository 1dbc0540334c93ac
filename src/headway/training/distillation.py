"""A run's objective on its model, and the teacher, loaded and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headway.data.hub_names import why_not_there
from headway.data.tokenizers import load_tokenizer
from headway.errors import ConfigError, DataError
from headway.model.checkpoint import has_heads, read_multi_token_config
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.loss_options import training_objective


def set_objective(config: TrainConfig, model: MultiTokenLM, tokenizer: Any, *, device: torch.device) -> None:
    """Train `model` towards the configuration's objective, with its teacher where it names one.

    Args:
        config: of the run.
        model: before anything is wrapped around it.
        tokenizer: of the run; the teacher must have the same.
        device: where the teacher goes. It keeps the precision in which it was saved.

    Raises:
        ConfigError: a teacher that cannot be loaded, or with another tokenizer or vocabulary.
    """
    teacher = None if config.teacher is None else _load(config.teacher, tokenizer).to(device)
    model.train_towards(training_objective(config), teacher=teacher)


def check_teacher(name: str, tokenizer: Any) -> None:
    """What can be said against a teacher without its weights, so that it is said before text is tokenised.

    Args:
        name: folder or hub name.
        tokenizer: of the run.

    Raises:
        ConfigError: no such folder or repository, a base that is no model without its heads, or other tokens than the run's.
    """
    _check_name(name)
    folder = Path(name)
    if has_heads(folder) and read_multi_token_config(folder).changes_base:
        raise ConfigError(
            f"teacher={name} has heads in its next-token path, so that its base alone is no model; export it with headway "
            f"convert --to hf first"
        )
    try:
        own = load_tokenizer(name)
    except DataError as error:
        raise _not_loaded(name, error) from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"teacher={name} reads other tokens than the run: got {len(own)} and {len(tokenizer)} of them; choose a teacher "
            f"with the run's tokenizer, or set tokenizer to the teacher's"
        )


def teacher_bytes(name: str) -> int:
    """Bytes of a teacher's weights in the precision in which they were saved; none is allocated or loaded.

    Args:
        name: folder or hub name; of one with heads, the base teaches.

    Raises:
        ConfigError: no configuration of a causal LM there.
    """
    _check_name(name)
    try:
        shape = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            teacher = AutoModelForCausalLM.from_config(shape, dtype=getattr(shape, "dtype", None) or torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(name, error) from error
    return sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())


def _not_loaded(name: str, error: Exception) -> ConfigError:
    detail = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(
        f"teacher={name} cannot be loaded as a causal LM with its tokenizer: {detail}; name a folder or a hub name"
    )


def _check_name(name: str) -> None:
    reason = why_not_there(name)
    if reason is not None:
        raise ConfigError(f"teacher={name} cannot be loaded: {reason}; name a folder or a hub name")


def _load(name: str, tokenizer: Any) -> Any:
    check_teacher(name, tokenizer)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(name, error) from error
