"""Arms of other engines: Hugging Face `generate` in its variants, and llama.cpp where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from headway.convert.gguf_export import export_gguf
from headway.convert.gguf_file import UNQUANTIZED, Precision, file_type
from headway.errors import HeadwayError
from headway.experiments.bench.figures import until_end
from headway.experiments.bench.generation import Arm, Generation, Limits, PromptBatch, Skipped
from headway.model.multi_token_lm import MultiTokenLM

_CONTEXT_SLACK = 8


def hugging_face(
    name: str, model: MultiTokenLM, limits: Limits, *, assistant: Path | None, num_lookup_tokens: int
) -> list[Arm | Skipped]:
    """`generate` of the model's base: dynamic or static cache, prompt lookup, or with an assistant.

    Args:
        name: "hf", "hf-static", "hf-lookup" or "hf-assisted".
        model: whose base decodes.
        limits: where it stops.
        assistant: folder of the smaller model.
        num_lookup_tokens: that prompt lookup drafts.
    """
    arguments: dict[str, Any] = {}
    if name == "hf-static":
        arguments = {"cache_implementation": "static"}
    elif name == "hf-lookup":
        arguments = {"prompt_lookup_num_tokens": num_lookup_tokens}
    elif name == "hf-assisted":
        if assistant is None:
            return [Skipped(name, "no assistant; pass the folder of a smaller model with --assistant")]
        try:
            smaller = AutoModelForCausalLM.from_pretrained(assistant, dtype=model.family.lm_head.weight.dtype)
        except Exception as error:  # transformers lets whatever a damaged file causes escape
            return [Skipped(name, f"the assistant cannot be loaded: {_line(error)}")]
        arguments = {"assistant_model": smaller.to(model.family.lm_head.weight.device).eval()}
    plain = name in ("hf", "hf-static")
    decode = partial(_generate, model.base, limits, arguments)
    return [Arm(name, "transformers", None, plain, decode, one_row=not plain)]


class _Counter(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Marks the first call; transformers asks once per forward."""

    def __init__(self, prompt_length: int, first_token: Callable[[], None]) -> None:
        self.calls = 0
        self.first = 0
        self._prompt_length = prompt_length
        self._first_token = first_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            self.first = input_ids.shape[1] - self._prompt_length
            self._first_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generate(
    base: Any, limits: Limits, arguments: dict[str, Any], batch: PromptBatch, first_token: Callable[[], None]
) -> Generation:
    length = batch.ids_BT.shape[1]
    counter = _Counter(length, first_token)
    if limits.temperature is not None:
        torch.manual_seed(limits.seed)
    sequences_BT = base.generate(
        batch.ids_BT,
        attention_mask=batch.mask_BT,
        stopping_criteria=StoppingCriteriaList([counter]),
        **limits.arguments(),
        **arguments,
    )
    ends = frozenset(limits.end_token_ids)
    tokens = [until_end(row, ends) for row in sequences_BT[:, length:].tolist()]
    return Generation(tokens, first=counter.first, forwards=counter.calls - 1)


def llama_cpp(
    files: Sequence[Path], limits: Limits, *, export: Callable[[], Sequence[Path]] | None = None
) -> list[Arm | Skipped]:
    """Plain decoding by llama.cpp, one arm per GGUF file.

    Args:
        files: exported from the same model, in any precision: the text may differ, which is counted and told.
        limits: where it stops.
        export: makes the files where none are given.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return [Skipped("llama.cpp", "the package llama_cpp is not installed (pip install llama-cpp-python)")]
    if not files and export is not None:
        try:
            files = export()
        except HeadwayError as error:
            return [Skipped("llama.cpp", str(error))]
    if not files:
        return [Skipped("llama.cpp", "no file; pass an export of the model with --gguf FILE")]
    made: list[Arm | Skipped] = []
    for file in files:
        name = f"llama.cpp {file.stem}"
        if not file.is_file():
            made.append(Skipped(name, f"there is no file {file.name}"))
            continue
        decode = partial(_llama_generate, _LlamaFile(file), limits)
        quantized = file_type(file) not in UNQUANTIZED
        made.append(Arm(name, "llama.cpp", None, True, decode, one_row=True, other_weights=True, other_model=quantized))
    return made


def own_exports(model: MultiTokenLM, tokenizer: Any, folder: Path) -> tuple[Path, ...]:
    """Write the model's plain part as GGUF, in the precision that it has and in Q8_0, and return the files.

    Args:
        model: whose base is exported.
        tokenizer: of it.
        folder: where the files go.

    Raises:
        IncompatibleModelError: a family that the export does not know.
        ConfigError: rows that Q8_0 cannot hold.
    """
    own: Precision = "bf16" if model.family.lm_head.weight.dtype == torch.bfloat16 else "f32"
    files = []
    precisions: tuple[Precision, ...] = (own, "q8_0")
    for precision in precisions:
        file = folder / f"{precision}.gguf"
        export_gguf(model.base, tokenizer, file, name="model", precision=precision)
        files.append(file)
    return tuple(files)


class _LlamaFile:
    """A GGUF file, loaded when the first prompt says how much context is needed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._loaded: Any = None
        self._context = 0

    def model(self, context: int) -> Any:
        if self._loaded is None or context > self._context:
            package = importlib.import_module("llama_cpp")
            self._context = context
            self._loaded = package.Llama(
                model_path=str(self._file), n_ctx=context, n_threads=torch.get_num_threads(), verbose=False
            )
        return self._loaded


def _llama_generate(
    file: _LlamaFile, limits: Limits, batch: PromptBatch, first_token: Callable[[], None]
) -> Generation:
    prompt = batch.prompt(0)
    model = file.model(len(prompt) + limits.max_new_tokens + _CONTEXT_SLACK)
    model.reset()
    tokens: list[int] = []
    # All tokens stay in the draw where there is one; 0 stands for no limit.
    chosen = {"temp": 0.0, "top_k": 1} if limits.temperature is None else {"temp": limits.temperature, "top_k": 0}
    for token in model.generate(prompt, **chosen, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
        tokens.append(int(token))
        if len(tokens) == 1:
            first_token()
        if len(tokens) == limits.max_new_tokens or token in limits.end_token_ids:
            break
    return Generation([tokens], first=1, forwards=len(tokens) - 1)


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
