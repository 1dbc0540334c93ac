"""What a run is made of, and which changes of it a resume accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headway.errors import TrainingError
from headway.training.config import TrainConfig
from headway.training.fields import field_specs

# Written by transformers at saving time; they say nothing about the model's shape.
_NOT_SHAPE = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache", "id2label", "label2id")


def run_identity(
    *,
    base_config: Any,
    num_future_tokens: int,
    tokenizer_fingerprint: str,
    data_fingerprint: str,
    held_out_fingerprint: str | None,
) -> dict[str, Any]:
    """A JSON-ready record of model shape, n, tokenizer and training tokens.

    Args:
        base_config: Hugging Face configuration with L layers in all.
        num_future_tokens: n.
        tokenizer_fingerprint: of what turns text into ids.
        data_fingerprint: of the training tokens themselves.
        held_out_fingerprint: of the held-out tokens; None where nothing is held out.
    """
    shape = {name: value for name, value in base_config.to_dict().items() if name not in _NOT_SHAPE}
    return {
        # As a checkpoint will give it back: JSON knows neither tuples nor numbers as keys.
        "model": json.loads(json.dumps(shape, sort_keys=True, default=str)),
        "num_future_tokens": num_future_tokens,
        "tokenizer": tokenizer_fingerprint,
        "data": data_fingerprint,
        "held_out": held_out_fingerprint,
    }


def check_same_run(
    saved_identity: Mapping[str, Any],
    saved_config: Mapping[str, Any],
    *,
    identity: Mapping[str, Any],
    config: TrainConfig,
    source: str,
) -> list[str]:
    """Refuse to continue another run; tell what else changed.

    Args:
        saved_identity: what the checkpoint was made of.
        saved_config: the configuration that wrote it.
        identity: what the run is made of now.
        config: its configuration now.
        source: the checkpoint, for messages.

    Returns:
        Changes that a resume accepts, one `name: old -> new` each; with any of them the run is continuous, not
        bit-equal.

    Raises:
        TrainingError: model, num_future_tokens, tokenizer, data, or an option that decides the order of the data or the
            optimizer's state changed; all of them are named.
    """
    refused = _identity_changes(saved_identity, identity)
    accepted = []
    for name, spec in field_specs(TrainConfig).items():
        former, current = saved_config.get(name, spec.default), config.to_dict()[name]
        if former == current or (isinstance(former, tuple) and list(former) == current):
            continue
        if spec.on_resume == "refuse":
            refused.append(f"{name} was {former}, is {current}")
        elif spec.on_resume == "announce":
            accepted.append(f"{name}: {former} -> {current}")
    if refused:
        raise TrainingError(
            f"cannot resume {source}: {'; '.join(refused)}; restore what changed, or start a new run with another "
            f"output folder (--output) or in place (--overwrite)"
        )
    return accepted


def _identity_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    changes = []
    if saved["num_future_tokens"] != current["num_future_tokens"]:
        changes.append(f"num_future_tokens was {saved['num_future_tokens']}, is {current['num_future_tokens']}")
    former, now = saved["model"], current["model"]
    different = [name for name in sorted(former.keys() | now.keys()) if former.get(name) != now.get(name)]
    if different:
        details = ", ".join(f"{name} was {former.get(name)}, is {now.get(name)}" for name in different)
        changes.append(f"the model changed ({details})")
    if saved["tokenizer"] != current["tokenizer"]:
        changes.append("the tokenizer changed")
    if saved["data"] != current["data"]:
        changes.append("the training data changed (other text, another split or another tokenizer)")
    if saved["held_out"] != current["held_out"]:
        changes.append("the held-out data changed (evaluations would not compare)")
    return changes
