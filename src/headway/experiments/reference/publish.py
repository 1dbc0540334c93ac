"""From a finished training run to the committed folder of the reference model.

reference/model/                  bfloat16 safetensors that load as float32, byte tokenizer, heads, record, model card
reference/training/               the run's own records: `headway report reference/training` draws them
reference/*.svg                   its curves
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from headway.data.fingerprint import data_fingerprint, tokenizer_fingerprint
from headway.data.near_duplicates import drop_near_duplicates
from headway.data.sources import Document, standard_library
from headway.data.split import split_by_group
from headway.data.tokenizers import byte_tokenizer, load_tokenizer
from headway.errors import CheckpointError, DataError
from headway.experiments.reference.place import RECORD
from headway.model.multi_token_lm import MultiTokenLM
from headway.provenance import provenance
from headway.training.run_files import CHECKPOINTS, CONFIG, EVALUATIONS, MARKER, METRICS, MODEL, RESULT

MOST_BYTES = 25_000_000
"""All safetensors files together."""

MODEL_FOLDER, TRAINING_FOLDER = "model", "training"


def publish(run: Path, target: Path, *, recipe: str, checkpoint: bool = False) -> dict[str, Any]:
    """Write `target`, replacing what an earlier call wrote there, and return the model's record.

    The weights are rounded to bfloat16 and config.json asks for float32: the folder is half as large, and whoever loads it
    computes in float32, in which text with drafts is the text without, token for token.

    Args:
        run: output folder of `headway train` on the standard library, with this interpreter.
        target: the folder `reference` of a repository.
        recipe: name of the recipe that the run was started with.
        checkpoint: take the newest checkpoint of a run that has not ended.

    Raises:
        CheckpointError: the run has no model yet, or too large a one.
        DataError: the run was not trained on this interpreter's library.
    """
    options = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    source, state = _source(run, checkpoint=checkpoint)
    data = _data(options, state["identity"])
    aside = target / f".{MODEL_FOLDER}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    loaded = MultiTokenLM.from_pretrained(source, dtype=torch.float32)
    whole = [parameter.detach() for parameter in loaded.parameters()]
    rounding = max(float((weight - weight.to(torch.bfloat16).float()).abs().max()) for weight in whole)
    model = loaded.to(torch.bfloat16)
    model.save_pretrained(aside)
    load_tokenizer(source).save_pretrained(aside)
    config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
    _write_json(aside / "config.json", config | {"dtype": "float32"})
    files = {str(path.relative_to(aside).as_posix()): path for path in sorted(aside.rglob("*")) if path.is_file()}
    weights = sum(path.stat().st_size for name, path in files.items() if name.endswith(".safetensors"))
    if weights > MOST_BYTES:
        raise CheckpointError(
            f"{run} makes {weights:,} bytes of weights, {MOST_BYTES:,} are allowed; train a smaller one"
        )
    record = {
        "name": run.resolve().name,
        "recipe": recipe,
        "seed": options["seed"],
        "step": state["state"]["step"],
        "finished": not checkpoint,
        "parameters": {
            "all": model.num_parameters(),
            "heads": sum(parameter.numel() for parameter in model.heads.parameters()),
        },
        "architecture": _architecture(config, model),
        "stored": {"dtype": "bfloat16", "loads_as": "float32", "bytes": weights, "largest_rounding": rounding},
        "training": _training(run, options, state),
        "data": data,
        "sha256": {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        "trained_with": json.loads((run / MARKER).read_text(encoding="utf-8"))["provenance"],
        "published_with": provenance(),
    }
    _write_json(aside / RECORD, record)
    shutil.rmtree(target / MODEL_FOLDER, ignore_errors=True)
    aside.rename(target / MODEL_FOLDER)
    _copy_records(run, target / TRAINING_FOLDER, options)
    return record


def _source(run: Path, *, checkpoint: bool) -> tuple[Path, dict[str, Any]]:
    """The model's folder and the state of the newest checkpoint, which tells what the run was made of."""
    newest = max((run / CHECKPOINTS).glob("step-*"), default=None)
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint; pass the output folder of headway train", path=run)
    state: dict[str, Any] = json.loads((newest / "run.json").read_text(encoding="utf-8"))
    if checkpoint:
        return newest / MODEL, state
    if not (run / RESULT).is_file():
        raise CheckpointError(f"{run} has not ended; wait for it, or pass --checkpoint for a trial", path=run)
    return run / MODEL, state


def _data(options: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """What was read and held out, checked against the fingerprints of the tokens that the run trained on."""
    if list(options["data"]) != ["stdlib"] or options["tokenizer"] != "bytes":
        raise DataError(f"the reference model reads bytes of the standard library: got data {options['data']}")
    split = split_by_group(
        standard_library(), held_out_fraction=options["held_out_fraction"], seed=options["split_seed"]
    )
    train = split.train
    if options["drop_near_duplicates"]:
        train = drop_near_duplicates(split.train, split.held_out).kept
    for name, documents in (("data", train), ("held_out", split.held_out)):
        if token_fingerprint(documents) != identity[name]:
            raise DataError(
                f"the run's {name} tokens are not those of this interpreter's library (their fingerprints differ); publish "
                f"with the Python that trained"
            )
    return {
        "source": "the standard library of CPython",
        "train": _summary(train, identity["data"]),
        "held_out": _summary(split.held_out, identity["held_out"]),
        "held_out_packages": sorted({document.group for document in split.held_out}),
        "held_out_fraction": options["held_out_fraction"],
        "split_seed": options["split_seed"],
        "near_duplicates_dropped": len(split.train) - len(train),
    }


def token_fingerprint(documents: Any) -> str:
    """The fingerprint that a token cache of these documents has, as bytes."""
    return sha256(f"{data_fingerprint(documents)}{tokenizer_fingerprint(byte_tokenizer())}".encode()).hexdigest()


def _summary(documents: Any, fingerprint: str) -> dict[str, Any]:
    found: list[Document] = list(documents)
    return {
        "documents": len(found),
        "bytes": sum(len(document.data) for document in found),
        "token_fingerprint": fingerprint,
    }


def _architecture(config: Mapping[str, Any], model: MultiTokenLM) -> dict[str, Any]:
    named = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    heads = model.mtp_config
    return {name: config[name] for name in (*named, "max_position_embeddings")} | {
        "num_future_tokens": model.num_future_tokens,
        "heads": heads.heads if model.num_future_tokens > 1 else None,
        "markov_rank": heads.markov_rank if model.num_future_tokens > 1 else 0,
    }


def _training(run: Path, options: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    step = state["state"]["step"]
    last = [record for record in _lines(run / METRICS) if record["step"] <= step][-1]
    evaluations = [record for record in _lines(run / EVALUATIONS) if record["step"] <= step]
    return {
        "steps": step,
        "planned_steps": options["steps"],
        "tokens": last["tokens"],
        "flops": last["flops"],
        "seconds": last["elapsed_seconds"],
        "sequence_length": options["sequence_length"],
        "batch_size": options["batch_size"],
        "optimizer": options["optimizer"],
        "precision": options["precision"],
        "last_evaluation": evaluations[-1] if evaluations else None,
    }


def _copy_records(run: Path, folder: Path, options: dict[str, Any]) -> None:
    """The run's own records without the folders of the machine that it ran on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, EVALUATIONS, MARKER):
        shutil.copyfile(run / name, folder / name)
    (folder / CONFIG).write_text(yaml.safe_dump(_shareable(options), sort_keys=False), encoding="utf-8")
    if (run / RESULT).is_file():
        _write_json(folder / RESULT, _shareable(json.loads((run / RESULT).read_text(encoding="utf-8"))))


def _shareable(value: Any) -> Any:
    """A record in which folders of a machine are their last names."""
    if isinstance(value, dict):
        return {name: _shareable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
