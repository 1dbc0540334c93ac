"""`headway info`: what works on this machine, or what a model weighs, without allocating it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headway.cli.console import DTYPES, counted, emit_json, show_facts, sized, torch_dtype
from headway.errors import CheckpointError, ConfigError, HeadwayError
from headway.provenance import compute_threads, cpu_model, package_versions, provenance, usable_cores

if TYPE_CHECKING:
    import torch

    from headway.model.memory import ModelFootprint

DEFAULT_SIZE_FUTURE_TOKENS = 4
DEFAULT_VOCABULARY_SIZE = 32000


@click.command("info")
@click.argument("model", required=False)
@click.option(
    "--num-future-tokens",
    "-n",
    type=click.IntRange(min=1),
    help="Tokens predicted per position, the next one included. Default: what the folder says; 1 for a plain "
    "Hugging Face folder (more: what heads would add to it); 4 for a size of the paper.",
)
@click.option(
    "--vocabulary-size",
    type=click.IntRange(min=1),
    help="Tokens of the vocabulary, for a size of the paper. Default: 32000.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of the cache. Default: the model's own, float32 for a size of the paper.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=1),
    help="Tokens per row in the cache. Default: the longest that the model allows.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Rows in the cache.")
def info_command(
    model: str | None,
    num_future_tokens: int | None,
    vocabulary_size: int | None,
    dtype: str | None,
    context_length: int | None,
    batch_size: int,
) -> None:
    """Show versions and device, or what a model costs in memory.

    MODEL is a headway folder, a plain Hugging Face folder, or a size of Table S14 of Gloeckle et al. 2024, such as
    30M, 0.3B or 6.7B. Nothing of the model is allocated. Without MODEL: what is installed and what works here.
    """
    if model is None:
        document = describe_machine()
        _show_machine(document)
    else:
        document = describe_model(
            model,
            num_future_tokens=num_future_tokens,
            vocabulary_size=vocabulary_size,
            dtype=dtype,
            context_length=context_length,
            batch_size=batch_size,
        )
        _show_model(document)
    emit_json(document)


def describe_machine() -> dict[str, Any]:
    """Versions, processor, devices and compiler, and the features of headway that hang on them."""
    import torch

    compiler = cpp_compiler()
    capabilities = torch.cpu.get_capabilities()
    devices = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "versions": package_versions(),
        "device": "cuda" if devices else "cpu",
        "cuda_devices": devices,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": compute_threads(),
        "cpp_compiler": compiler,
        "works_here": {
            "train": True,
            "generate": True,
            "compiled_layers": compiler is not None,
            "bfloat16_in_hardware": bool(
                capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
            )
            or (bool(devices) and torch.cuda.is_bf16_supported(including_emulation=False)),
        },
        "provenance": provenance(),
    }


def cpp_compiler() -> str | None:
    """Name of the C++ compiler that torch would use to compile layers: $CXX, or the first usual one on the path."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return Path(name).name
    return None


def describe_model(
    model: str,
    *,
    num_future_tokens: int | None = None,
    vocabulary_size: int | None = None,
    dtype: str | None = None,
    context_length: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Parameter counts and memory of a folder or of a size of the paper.

    Raises:
        ConfigError: options that do not belong to this kind of model, or an unknown name.
        CheckpointError: a folder that holds no model.
        IncompatibleModelError: a family that heads cannot be attached to.
    """
    from headway.model.sizes import PAPER_SIZES

    if Path(model).is_dir():
        if vocabulary_size is not None:
            raise ConfigError(
                f"--vocabulary-size is for sizes of the paper: {model} is a folder and has its own; leave it out"
            )
        kind, config, future, footprint = _folder_footprint(Path(model), num_future_tokens, dtype)
    elif model in PAPER_SIZES:
        kind, config, future, footprint = _paper_footprint(model, num_future_tokens, vocabulary_size, dtype)
    else:
        raise ConfigError(
            f"{model} is neither a folder here nor a size of the paper's Table S14; the sizes are "
            f"{', '.join(PAPER_SIZES)}"
        )
    context = context_length or int(config.max_position_embeddings)
    return _model_document(model, kind, config, future, footprint, context, batch_size)


def _folder_footprint(
    folder: Path, num_future_tokens: int | None, dtype: str | None
) -> tuple[str, Any, int, ModelFootprint]:
    from headway.model.checkpoint import has_heads, read_multi_token_config
    from headway.model.config import MultiTokenConfig
    from headway.model.memory import attached_footprint

    if has_heads(folder):
        kind, mtp_config = "headway folder", read_multi_token_config(folder)
        saved = mtp_config.num_future_tokens
        if num_future_tokens not in (None, saved):
            raise ConfigError(
                f"--num-future-tokens={num_future_tokens} does not fit {folder}: its heads are for {saved}; leave "
                f"it out"
            )
    else:
        kind, mtp_config = (
            "plain Hugging Face folder",
            MultiTokenConfig(num_future_tokens=num_future_tokens or 1),
        )
    config = _base_config(folder)
    own_name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    chosen: torch.dtype = torch_dtype(dtype or (own_name if own_name in DTYPES else "float32"))
    try:
        footprint = attached_footprint(config, mtp_config, dtype=chosen)
    except HeadwayError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a model that can be built: {type(error).__name__}: {reason}; "
            f"restore it",
            path=folder,
        ) from error
    return kind, config, mtp_config.num_future_tokens, footprint


def _base_config(folder: Path) -> Any:
    from headway.model.base_folder import read_base_config

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a model folder, or holds heads alone; pass the folder of the "
            f"whole model",
            path=folder,
        )
    try:
        return read_base_config(folder)
    except HeadwayError:
        raise
    except Exception as error:  # transformers lets whatever a damaged file causes escape
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {reason}; restore it", path=folder) from error


def _paper_footprint(
    name: str, num_future_tokens: int | None, vocabulary_size: int | None, dtype: str | None
) -> tuple[str, Any, int, ModelFootprint]:
    from headway.model.config import MultiTokenConfig
    from headway.model.memory import footprint
    from headway.model.sizes import paper_config

    future = num_future_tokens or DEFAULT_SIZE_FUTURE_TOKENS
    config = paper_config(name, vocab_size=vocabulary_size or DEFAULT_VOCABULARY_SIZE)
    mtp_config = MultiTokenConfig(num_future_tokens=future)
    size = footprint(config, mtp_config, dtype=torch_dtype(dtype or "float32"))
    return "size of Table S14", config, future, size


def _model_document(
    model: str, kind: str, config: Any, future: int, footprint: ModelFootprint, context: int, batch_size: int
) -> dict[str, Any]:
    cache = footprint.cache
    rows = {"context_length": context, "batch_size": batch_size}
    return {
        "model": Path(model).name if Path(model).is_absolute() else model,
        "kind": kind,
        "model_type": config.model_type,
        "num_future_tokens": future,
        "vocabulary_size": config.vocab_size,
        "width": config.hidden_size,
        "layers": footprint.layers,
        "head_layers": footprint.head_layers,
        "parameters": {
            "total": footprint.total_parameters,
            "non_embedding": footprint.non_embedding_parameters,
            "embedding": footprint.embedding_parameters,
            "unembedding": footprint.unembedding_parameters,
            "heads": footprint.head_parameters,
        },
        "weight_bytes": {name: footprint.total_parameters * torch_dtype(name).itemsize for name in DTYPES},
        "kv_cache": {
            "dtype": str(footprint.dtype).removeprefix("torch."),
            "bytes_per_token": cache.bytes_per_token,
            **rows,
            "bytes": cache.total_bytes(**rows),
            "sliding_layers": cache.sliding_layers,
            "sliding_window": cache.sliding_window,
            "bytes_if_windowed": cache.windowed_bytes(**rows),
        },
        "provenance": provenance(),
    }


def _show_machine(document: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in document["versions"].items())
    works = document["works_here"]
    compiler = document["cpp_compiler"]
    facts = [
        ("versions", versions),
        ("processor", f"{document['cpu']}, {document['cores']} cores, {document['threads']} threads"),
        *(("GPU", f"{device['name']}, {sized(device['memory_bytes'])}") for device in document["cuda_devices"]),
        ("device", document["device"]),
        ("C++ compiler", compiler or "none: layers are not compiled, training is slower"),
        ("train, generate", "yes"),
        ("compiled layers", "yes" if works["compiled_layers"] else "no"),
        ("bfloat16", "in hardware" if works["bfloat16_in_hardware"] else "emulated: slower than float32"),
    ]
    show_facts("headway on this machine", facts)


def _show_model(document: dict[str, Any]) -> None:
    parameters, cache = document["parameters"], document["kv_cache"]
    future = document["num_future_tokens"]
    heads = f"{document['head_layers']} of them heads" if future > 1 else "no heads: the plain model"
    if future > 1 and not document["head_layers"]:
        heads = "heads are no layers"
    facts = [
        ("kind", f"{document['kind']}, {document['model_type']}"),
        ("future tokens", f"{future}, the next one included"),
        (
            "shape",
            f"{document['layers']} layers ({heads}), width {document['width']}, vocabulary "
            f"{document['vocabulary_size']}",
        ),
        ("parameters", f"{counted(parameters['total'])} ({parameters['total']:,})"),
        ("  non-embedding", f"{counted(parameters['non_embedding'])}, heads included"),
        (
            "  embedding",
            f"{counted(parameters['embedding'])} in, "
            + (f"{counted(parameters['unembedding'])} out" if parameters["unembedding"] else "tied to the output"),
        ),
        ("  heads", counted(parameters["heads"])),
        ("weights", ", ".join(f"{sized(size)} {name}" for name, size in document["weight_bytes"].items())),
        ("KV cache", f"{sized(cache['bytes_per_token'])} per token, {cache['dtype']}"),
        ("", f"{sized(cache['bytes'])} for {cache['batch_size']} x {cache['context_length']} tokens"),
    ]
    if cache["sliding_layers"]:
        facts.append(
            (
                "",
                f"{cache['sliding_layers']} layers look back {cache['sliding_window']} tokens only; headway's cache "
                f"keeps all ({sized(cache['bytes_if_windowed'])} if it forgot)",
            )
        )
    show_facts(document["model"], facts)
