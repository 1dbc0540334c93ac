"""Model folders as commands take them: with heads, or plain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.errors import CheckpointError

if TYPE_CHECKING:
    from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode.

    Attributes:
        name: the folder's last name.
        model: in eval mode, on its device; a plain folder as a model with n = 1.
        tokenizer: of the folder.
        has_heads: whether the folder holds heads.
    """

    name: str
    model: MultiTokenLM
    tokenizer: Any
    has_heads: bool


def load_model_folder(folder: str, *, dtype: str | None) -> LoadedModel:
    """Load a headway folder, or a plain Hugging Face folder as the 1-token model that it is.

    Names of the Hugging Face hub are refused: a command of this project never downloads a model by itself.

    Args:
        folder: local path.
        dtype: of the weights; None keeps that of the files.

    Raises:
        CheckpointError: no such folder, no model in it, or damaged files.
        DataError: no tokenizer in it.
        IncompatibleModelError: a plain model of a family that the engine does not know.
    """
    import torch

    from headway.cli.console import quiet_libraries, torch_dtype
    from headway.data.tokenizers import load_tokenizer
    from headway.model.checkpoint import has_heads

    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no model folder {folder}; check the path, or train one with `headway train` (a model of the "
            f"hub is downloaded first: `hf download NAME --local-dir DIR`)",
            path=folder,
        )
    quiet_libraries()
    options = {} if dtype is None else {"dtype": torch_dtype(dtype)}
    with_heads = has_heads(path) or (path / "mtp").is_dir()
    model = _load_with_heads(path, options) if with_heads else _load_plain(path, options)
    tokenizer = load_tokenizer(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(path.resolve().name, model.to(device).eval(), tokenizer, with_heads)


def _load_with_heads(path: Path, options: dict[str, Any]) -> MultiTokenLM:
    from headway.model.multi_token_lm import MultiTokenLM

    return MultiTokenLM.from_pretrained(path, **options)


def _load_plain(path: Path, options: dict[str, Any]) -> MultiTokenLM:
    from transformers import AutoModelForCausalLM

    from headway.model.attach import attach_heads
    from headway.model.config import MultiTokenConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a model folder; check the path", path=path)
    try:
        base, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # transformers lets whatever a damaged file causes escape
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be loaded: {reason}; restore its files", path=path) from error
    lost = [*map(str, report.get("missing_keys", ())), *map(str, report.get("mismatched_keys", ()))]
    if lost:
        raise CheckpointError(
            f"the weights in {path} do not fill the model: {len(lost)} tensors are missing or of another shape (first: "
            f"{min(lost)}); restore its files",
            path=path,
        )
    return attach_heads(base, MultiTokenConfig(num_future_tokens=1))
