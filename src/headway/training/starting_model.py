"""The model that a run begins with: drawn at random, or a pretrained one with heads."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headway.errors import CheckpointError, ConfigError
from headway.model.base_folder import base_place
from headway.model.checkpoint import HEADS_FILE, check_heads_file, has_heads, read_multi_token_config, read_record
from headway.model.config import MultiTokenConfig
from headway.model.fingerprint import same_base
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.initialization import scaled_initialization
from headway.training.model_building import fresh_model, multi_token_config


def starting_model(config: TrainConfig, shape: Any) -> MultiTokenLM:
    """The weights before the first step, float32.

    Args:
        config: of the run.
        shape: from `base_config`.

    Raises:
        ConfigError: `init_from` has heads of another architecture, or ones whose number cannot be changed.
        CheckpointError: `init_from` is no model folder, or a damaged one.
    """
    if config.init_from is not None:
        return model_from_folder(Path(config.init_from), multi_token_config(config))
    model = fresh_model(config, shape)
    if config.initialization == "scaled":
        scaled_initialization(model)
    return model


def check_start(config: TrainConfig) -> None:
    """What can be said against `init_from` without its weights, so that it is said before text is tokenised.

    Raises:
        ConfigError: heads of another architecture, or ones whose number cannot be changed.
        CheckpointError: a folder whose configuration of heads is damaged.
    """
    if config.init_from is not None:
        _check_heads(Path(config.init_from), multi_token_config(config))


def model_from_folder(folder: Path, wanted: MultiTokenConfig) -> MultiTokenLM:
    """A pretrained base with n' heads: those that the folder has, without the farthest or with copies of the last layer.

    With n' = 1 it is the plain model, whatever heads the folder has.

    Args:
        folder: a headway folder, or a plain Hugging Face one.
        wanted: the heads; of a folder with heads, the same but for their number.

    Raises:
        ConfigError: the folder's heads are of another architecture, or part of the next-token path and not as many.
        CheckpointError: no model folder, or a damaged one.

    Source: Gloeckle et al. 2024, section 3.6: finetuning with n' = 1 ("extra heads removed") and with n' = n.
    """
    held = _check_heads(folder, wanted)
    if held is None:
        return MultiTokenLM(_base(folder, folder), wanted)
    record = read_record(folder)
    check_heads_file(folder, record)
    place, options = base_place(folder)
    base = _base(folder, place, **options)
    if not same_base(record["base"]["fingerprint"], base):
        raise CheckpointError(
            f"{folder} mixes two models: its heads were saved with another base than the weights beside them; restore it",
            path=folder,
        )
    if held.changes_base:
        # The folder's model has these heads on its next-token path: nothing changes.
        wanted = replace(wanted, allow_base_change=True)
    model = MultiTokenLM(base, wanted)
    own = model.heads.state_dict()
    tensors = {name: tensor for name, tensor in load_file(folder / HEADS_FILE).items() if name in own}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the heads in {folder} do not fit their base ({name} is {tuple(tensor.shape)}, not "
                    f"{tuple(own[name].shape)}); restore the folder",
                    path=folder / HEADS_FILE,
                )
            own[name].copy_(tensor)
    return model


def _base(folder: Path, place: Path, **options: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    except Exception as error:  # transformers lets whatever a damaged file causes escape
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"init_from={folder} cannot be loaded as a causal LM: {detail}; name a folder that save_pretrained wrote",
            path=folder,
        ) from error


def _check_heads(folder: Path, wanted: MultiTokenConfig) -> MultiTokenConfig | None:
    """The heads that the folder has, which can become the wanted ones; None where it has none."""
    if not has_heads(folder):
        _check_new_heads(folder, wanted)
        return None
    held = read_multi_token_config(folder)
    _check_same_heads(folder, held, wanted)
    return held


def _check_new_heads(folder: Path, wanted: MultiTokenConfig) -> None:
    if wanted.changes_base and not wanted.allow_base_change:
        raise ConfigError(
            f"heads with wiring={wanted.wiring} become part of the next-token path, so that the weights of init_from="
            f"{folder} would no longer be the model they were; leave init_from out and train from scratch, or choose "
            f"another wiring"
        )


def _check_same_heads(folder: Path, held: MultiTokenConfig, wanted: MultiTokenConfig) -> None:
    if held.num_future_tokens == 1 or wanted.num_future_tokens == 1:
        _check_new_heads(folder, wanted)
        if held.changes_base and wanted.num_future_tokens == 1:
            raise _other_number(folder, held, wanted)
        return
    names = ["heads", *sorted(asdict(held.head_options).keys() - {"allow_base_change"})]
    other = [name for name in names if getattr(held, name) != getattr(wanted, name)]
    if other:
        has, got = (", ".join(f"{name}={getattr(side, name)}" for name in other) for side in (held, wanted))
        drop = "" if held.changes_base else ", or num_future_tokens to 1 to drop the heads"
        raise ConfigError(f"init_from={folder} has heads with {has}: got {got}; set these as the folder has them{drop}")
    if held.changes_base and held.num_future_tokens != wanted.num_future_tokens:
        raise _other_number(folder, held, wanted)


def _other_number(folder: Path, held: MultiTokenConfig, wanted: MultiTokenConfig) -> ConfigError:
    return ConfigError(
        f"the heads of init_from={folder} are part of its next-token path (wiring={held.wiring}), so their number "
        f"cannot change: got num_future_tokens={wanted.num_future_tokens}, the folder has {held.num_future_tokens}; "
        f"set num_future_tokens to that"
    )
