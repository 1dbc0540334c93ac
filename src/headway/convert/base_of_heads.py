"""The base of heads that come without one: a folder, or a repository of the hub by its name."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from huggingface_hub import snapshot_download

from headway.convert.companions import TRAVELLING
from headway.convert.lazy_model import ModelFormat
from headway.errors import CheckpointError, ConfigError

_WEIGHTS = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def base_folder(
    given: str | PathLike[str] | None, reader: ModelFormat, source: Path
) -> tuple[Path | None, tuple[str, ...]]:
    """Where the base of the heads in `source` is; fetched from the hub where it is given or named by its name there.

    Args:
        given: folder or hub name from the caller.
        reader: format of the source.
        source: folder of the heads.

    Returns:
        The folder, None where the source holds its base; and notes for the report.

    Raises:
        ConfigError: a base for a source that holds its own.
        CheckpointError: a base that is neither a folder nor to be had.
    """
    named = reader.named_base(source)
    may_be_alone = not reader.holds_base or named is not None or reader.name == "headway"
    if given is not None and not may_be_alone:
        raise ConfigError(
            f"--base is for heads alone (headway, medusa, medusa-engine): leave it out with --from {reader.name}"
        )
    if given is not None:
        return _fetch(fspath(given), ""), ()
    if named is None:
        return None, ()
    for place in (source / named, Path(named)):
        if place.is_dir() and place.resolve() != source.resolve():
            return place, (f"the base is {named}, as the heads name it",)
    return _fetch(named, f"{source} holds heads alone, made for {named}; "), (
        f"the base is {named}, as the heads name it",
    )


def _fetch(name: str, why: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    fix = "pass the folder or the hub name of their base with --base"
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{why}there is no model folder {name}: {fix}", path=name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*_WEIGHTS, *TRAVELLING]))
    except Exception as error:  # the hub client's errors have no common base
        raise CheckpointError(
            f"{why}{name} is neither a folder here nor a repository that could be fetched ({type(error).__name__}): {fix}",
            path=name,
        ) from error
