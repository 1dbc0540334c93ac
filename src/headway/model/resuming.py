"""Plain base weights that a loop loads into a multi-token model bring their heads along.

A saved folder is a plain checkpoint of its base, so a loop that reads its `model.safetensors` and calls
`load_state_dict(..., strict=False)`, as the Hugging Face Trainer does for `resume_from_checkpoint` and
`load_best_model_at_end`, holds the base's tensors under the base's own names and nothing of the heads: PyTorch would
skip every one of them without an error. Here they are renamed and the heads read from the same folder, or the load is
refused before a single tensor has been copied. Heads that the model has no place for are refused as well.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from headway.errors import CheckpointError
from headway.model.checkpoint import read_heads_for


def restore_heads_too(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict that holds the plain base's tensors; leaves every other state dict as it is.

    A load-state-dict pre-hook of `MultiTokenLM`, for what `strict=False` would pass over.

    Args:
        model: the multi-token model that is being loaded into.
        state_dict: what is being loaded; changed in place.
        prefix: of this model's keys, where it is part of another module.

    Raises:
        CheckpointError: nobody says which folder the tensors come from, or its heads are missing, damaged, of another
            base or of another shape than the model's; or the state dict has heads that the model has not.
    """
    _refuse_surplus_heads(model, state_dict, prefix)
    plain = _plain_base_tensors(model, state_dict, prefix)
    if not plain:
        return
    folder = folder_of_the_trainer()
    if folder is None:
        raise CheckpointError(
            f"these are the weights of a plain base ({next(iter(plain))}, ...): loading them would lose the heads, and "
            f"nothing was loaded; load the folder with MultiTokenLM.from_pretrained, or the base alone with "
            f"model.base.load_state_dict"
        )
    heads = read_heads_for(model, folder, plain)
    for name in plain:
        state_dict[f"{prefix}base.{name}"] = state_dict.pop(f"{prefix}{name}")
    for name, source in (model.base.all_tied_weights_keys or {}).items():
        if name not in plain and source in plain:
            state_dict[f"{prefix}base.{name}"] = plain[source]
    for name, tensor in heads.items():
        state_dict[f"{prefix}heads.{name}"] = tensor


def folder_of_the_trainer() -> Path | None:
    """The checkpoint that a Hugging Face Trainer is loading right now, further up the call stack; None where none is.

    Trainer hands `load_state_dict` tensors and no path (transformers 5.23, `_load_from_checkpoint`, `_load_best_model`),
    so the path is read off its own call. What is found is checked against the tensors' fingerprint before it is used.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_code.co_name
        if caller in ("_load_from_checkpoint", "_load_best_model"):
            names = frame.f_locals
            trainer = names.get("self")
            if any((kind.__module__, kind.__name__) == _TRAINER for kind in type(trainer).__mro__):
                best = getattr(getattr(trainer, "state", None), "best_model_checkpoint", None)
                found = names.get("resume_from_checkpoint") if caller == "_load_from_checkpoint" else best
                if found is not None:
                    return Path(found)
        frame = frame.f_back
    return None


_TRAINER = ("transformers.trainer", "Trainer")
_NUMBERED = re.compile(r"(?P<list>heads(?:\.[A-Za-z_]\w*)*)\.(?P<number>\d+)\.")


def _refuse_surplus_heads(model: Any, state_dict: dict[str, Any], prefix: str) -> None:
    places = {path: {name for name, _ in module.named_children()} for path, module in model.named_modules()}
    for name in state_dict:
        numbered = _NUMBERED.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if numbered is None or numbered["number"] in places.get(numbered["list"], {numbered["number"]}):
            continue
        raise CheckpointError(
            f"the tensors to be loaded hold {name}, for which the model with num_future_tokens={model.num_future_tokens} has "
            f"no place: a head would be lost, and nothing was loaded; make the model with the num_future_tokens that they "
            f"were saved with"
        )


def _plain_base_tensors(model: Any, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    parts = {name for name, _ in model.base.named_children()} - {name for name, _ in model.named_children()}
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    return {name: state_dict[f"{prefix}{name}"] for name in names if name.split(".", 1)[0] in parts}
