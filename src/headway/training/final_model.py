"""The finished model of a run: written aside and moved, so that a run folder never holds half of one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from headway.errors import CheckpointError
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.checkpoint import reason, save_tokenizer, sync_tree

_ASIDE = ".writing-model"


def write_final_model(
    model: MultiTokenLM, tokenizer: Any, directory: Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write model and tokenizer to `directory`, in the place of what is there.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        directory: the folder.
        state_dict: whole weights, where the model has shards.

    Raises:
        CheckpointError: the disk refuses; the run's last checkpoint holds the same weights.
    """
    aside = directory.with_name(_ASIDE)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside / directory.name, state_dict=None if state_dict is None else dict(state_dict))
        save_tokenizer(tokenizer, aside / directory.name)
        sync_tree(aside)
        if directory.exists():
            shutil.rmtree(directory)
        (aside / directory.name).rename(directory)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"cannot write the finished model to {directory}: {reason(error)}; the last checkpoint holds the same weights: free "
            f"space, then start the same command again",
            path=directory,
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished_model(folder: Path) -> None:
    """Remove what a killed process left of a final model in a run's folder."""
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)
