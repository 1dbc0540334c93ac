"""`convert`: read a model in one format, write it in another, tensor by tensor.

report = convert("7B_200B_4", "code-7b", source_format="facebook", target_format="headway", verify=True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from headway.convert.base_of_heads import base_folder
from headway.convert.companions import TOKENIZER_FILES, Companions, copy_companions, find_companions
from headway.convert.formats import EXPORT_FORMATS, MODEL_FORMATS, model_format, written_format
from headway.convert.future_tokens import with_future_tokens, without_auxiliary
from headway.convert.gguf_ready import gguf_obstacles
from headway.convert.lazy_model import LazyModel, ModelFormat, WrittenFormat
from headway.convert.recognise import looks_like
from headway.convert.report import ConversionReport, Verification
from headway.convert.tokenizer import complete_tokenizer
from headway.convert.verification import verify as verify_folder
from headway.errors import CheckpointError, ConfigError
from headway.model.config import HeadArchitecture, HeadInit, MultiTokenConfig
from headway.model.folder import write_folder

Progress = Callable[[int, int], None]


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    source_format: str,
    target_format: str,
    num_future_tokens: int | None = None,
    heads: HeadArchitecture | None = None,
    head_options: Mapping[str, Any] | None = None,
    head_init: HeadInit = "copy",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    base: str | PathLike[str] | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a model folder; weights pass through memory one tensor at a time.

    The result is written aside and moved into place when it is whole (and, with `verify`, equal to its source): an
    interrupted or refused conversion leaves nothing. The source is only read.

    Args:
        source: local folder.
        destination: folder to write; its other files are kept.
        source_format: a name of `headway.convert.names.FORMATS`.
        target_format: likewise, or a name of `headway.convert.names.EXPORTS`.
        num_future_tokens: n of the result, the next token included: fewer than the source's drops the farthest heads,
            more adds heads that need training. Not given: n stays; required from `hf` to `headway`, where it is the
            choice to be made.
        heads: architecture of the heads that a model without any gets; transformer heads where not given.
        head_options: fields of `headway.heads.options.HeadOptions` for these heads.
        head_init: how added heads start: "copy" from the base's own weights, or "fresh" as the family draws them.
        seed: of fresh heads.
        dtype: of the weights written; None keeps each tensor's own.
        base: folder or hub name of the plain base, where the source holds heads alone; not given: the one that the heads
            name.
        overwrite: replace a model that is in the destination, whatever its format.
        verify: load the result and compare tensors and logits of every offset with the source (`Verification`). Takes
            the memory of a float32 model and the time of a forward.
        progress: told the bytes written so far and in all.

    Raises:
        ConfigError: options that do not go together.
        CheckpointError: a source that is damaged or of another format, tensors that are missing or unknown (by name), a
            destination that holds a model, a result that differs from its source.
        IncompatibleModelError: something that the target cannot hold exactly; names it and the nearest alternative.
    """
    reader, writer = model_format(source_format), written_format(target_format)
    read_back = MODEL_FORMATS.get(target_format)
    if verify and read_back is None:
        raise ConfigError(
            f"format {writer.name} is written, not read, so its result cannot be loaded and compared here: leave verify out"
        )
    source, destination = Path(source), Path(destination)
    _check_source(source, reader)
    base, base_notes = base_folder(base, reader, source)
    _check_destination(destination, source, base)
    if verify and not writer.holds_base and base is None and not reader.is_hugging_face:
        raise ConfigError(
            f"a {writer.name} folder can be verified where its base is a Hugging Face folder: got --from {reader.name}; "
            f"convert to headway first, and from there to {writer.name}"
        )
    original = reader.read(source, base=base)
    model = _of_kind(original, writer, num_future_tokens, heads, head_options)
    model = _with_heads(model, reader, writer, num_future_tokens, head_init=head_init, seed=seed)
    if writer.name != "headway":
        model = without_auxiliary(model)
    model = writer.prepare(model).map(lambda tensor: tensor.to(dtype))
    companions = find_companions(source, reader.files, base=base)
    notes: list[str] = [*base_notes]
    verification: list[Verification] = []
    gguf: list[tuple[str, ...] | None] = []
    files: dict[str, int] = {}

    def write(folder: Path) -> None:
        copy_companions(companions, folder)
        if writer.is_hugging_face:
            notes.extend(complete_tokenizer(folder))
        notes.extend(writer.write(_watched(model, progress), folder))
        if verify and read_back is not None:
            found = verify_folder(
                model,
                source=source,
                source_format=reader,
                base=base,
                written=folder,
                target_format=read_back,
                dtype=dtype,
            )
            verification.append(found)
        gguf.append(gguf_obstacles(folder) if writer.name == "hf" else None)
        files.update(
            {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        )

    formats: list[WrittenFormat] = [*MODEL_FORMATS.values(), *EXPORT_FORMATS.values()]
    every_file = {pattern for format_ in formats for pattern in format_.files}
    markers = [format_.marker for format_ in formats]
    write_folder(
        destination,
        write,
        overwrite=overwrite,
        replaces=[*markers, "model.safetensors", "consolidated.00.pth"],
        # A tokenizer must not outlive the model that it was made for.
        removes=[*sorted(every_file), *TOKENIZER_FILES],
    )
    return _report(original, model, reader, writer, files, companions, tuple(notes), gguf[0], verification)


def _check_source(source: Path, reader: ModelFormat) -> None:
    if not source.is_dir():
        raise CheckpointError(
            f"there is no model folder {source}; check the path (a model of the hub is downloaded first: `hf download "
            f"NAME --local-dir DIR`)",
            path=source,
        )
    if not (source / reader.marker).is_file():
        found = looks_like(source)
        hint = f"it looks like --from {found}" if found else "it is not a model folder, or half written"
        raise CheckpointError(
            f"{source} is not in format {reader.name} ({reader.marker} is missing): {hint}", path=source
        )


def _check_destination(destination: Path, source: Path, base: Path | None) -> None:
    if source.resolve() == destination.resolve() or (base is not None and base.resolve() == destination.resolve()):
        raise ConfigError(f"source and destination are one folder, {destination}; write to another one")


def _of_kind(
    model: LazyModel,
    writer: WrittenFormat,
    num_future_tokens: int | None,
    heads: HeadArchitecture | None,
    head_options: Mapping[str, Any] | None,
) -> LazyModel:
    if heads is None and not head_options:
        return model
    if model.num_future_tokens > 1:
        raise ConfigError(
            f"the source has heads={model.mtp_config.heads!r} already, so heads and head_options have no place; leave them "
            f"out, or convert it to hf first"
        )
    if not writer.holds_heads or num_future_tokens is None or num_future_tokens < 2:
        raise ConfigError(
            f"heads and head_options say which heads are added: pass num_future_tokens >= 2 and a format that holds heads "
            f"(got num_future_tokens={num_future_tokens}, format {writer.name})"
        )
    values = {"num_future_tokens": num_future_tokens, "heads": heads or "transformer", **(head_options or {})}
    if MultiTokenConfig.from_dict(values).changes_base:
        raise ConfigError(
            f"heads with wiring={values['wiring']!r} become part of the next-token path, so the result would be another "
            f"model; train it from scratch, or attach it in Python (headway.attach_heads)"
        )
    return replace(model, mtp_config=MultiTokenConfig.from_dict(values | {"num_future_tokens": 1}))


def _with_heads(
    model: LazyModel,
    reader: ModelFormat,
    writer: WrittenFormat,
    num_future_tokens: int | None,
    *,
    head_init: HeadInit,
    seed: int,
) -> LazyModel:
    if num_future_tokens is not None and num_future_tokens < 1:
        raise ConfigError(f"num_future_tokens must be >= 1 (it includes the next token): got {num_future_tokens}")
    if not writer.holds_heads:
        if num_future_tokens not in (None, 1):
            raise ConfigError(
                f"format {writer.name} holds no heads, so num_future_tokens={num_future_tokens} has no place in it; write to "
                f"headway, or leave it out"
            )
        return model
    if num_future_tokens is None:
        if not reader.holds_heads and writer.name == "headway":
            raise ConfigError(
                f"a model in format {reader.name} has no heads: say how many tokens the result shall predict with "
                f"num_future_tokens (--num-future-tokens 4 adds three heads, which need training)"
            )
        return model
    return with_future_tokens(model, num_future_tokens, head_init=head_init, seed=seed)


def _watched(model: LazyModel, progress: Progress | None) -> LazyModel:
    if progress is None:
        return model
    total = model.num_bytes
    done = 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(min(done, total), total)

    return model.map(lambda tensor: tensor.watched(add))


def _report(
    original: LazyModel,
    model: LazyModel,
    reader: ModelFormat,
    writer: WrittenFormat,
    files: dict[str, int],
    companions: Companions,
    notes: tuple[str, ...],
    gguf: tuple[str, ...] | None,
    verification: list[Verification],
) -> ConversionReport:
    return ConversionReport(
        source_format=reader.name,
        target_format=writer.name,
        model_type=str(model.config.model_type),
        base_name=model.base_name,
        source_num_future_tokens=original.num_future_tokens,
        num_future_tokens=model.num_future_tokens,
        dtype=",".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors})),
        num_base_tensors=len(model.base),
        num_head_tensors=len(model.heads),
        num_bytes=model.num_bytes,
        files=files,
        companions=companions.copied,
        left_behind=companions.left_behind,
        left_out=model.left_out,
        notes=model.notes + notes,
        gguf_obstacles=gguf,
        verification=verification[0] if verification else None,
    )
