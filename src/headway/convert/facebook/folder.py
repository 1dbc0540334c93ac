"""Format `facebook`: params.json and consolidated.*.pth, in Meta's own layout.

`layers` holds the trunk and, last, the layer of the next token; `extra_heads` those of offsets 2..n.
What params.json has no field for (longest context, special tokens, loss weights, the base's name) is written to
headway.json beside it, which Meta's code does not read and headway does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.convert.architecture import architecture, check_complete, unlike_the_paper
from headway.convert.facebook.forward import meta_logits
from headway.convert.facebook.params import PARAMS_FILE, FacebookParams, from_config, read_params, to_config
from headway.convert.facebook.shards import PATTERN, open_shards
from headway.convert.facebook.tensors import from_meta, meta_name_of_base, meta_name_of_head, to_meta
from headway.convert.lazy_model import LazyModel, LazyTensor, WeightChange
from headway.convert.plain_folder import GENERATION_FILE, read_generation, write_generation
from headway.convert.torch_files import write_torch_file
from headway.errors import CheckpointError, HeadwayError, IncompatibleModelError
from headway.model.config import MultiTokenConfig
from headway.provenance import provenance

WEIGHTS_FILE = "consolidated.00.pth"
SIDECAR_FILE = "headway.json"
TOKENIZER_FILE = "tokenizer.model"
CONTEXT_LENGTH = 4096  # "context" of the 7B token models on code, Table S13
LLAMA_BOS_ID, LLAMA_EOS_ID = 1, 2  # of the Llama 2 tokenizer, which the released models use

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "output.weight"
_FREQUENCIES = "rope.freqs"
_SIDECAR_FIELDS = (
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class FacebookFolder:
    """See the module."""

    name = "facebook"
    marker = PARAMS_FILE
    files = (PARAMS_FILE, PATTERN, SIDECAR_FILE, GENERATION_FILE)
    holds_heads = True
    holds_base = True
    is_hugging_face = False

    def named_base(self, folder: Path) -> str | None:
        """See `ModelFormat.named_base`: it holds its base."""
        return None

    def read(self, folder: Path, *, base: Path | None = None) -> LazyModel:
        """See `ModelFormat.read`."""
        params = read_params(folder)
        found = open_shards(folder, params)
        vocab_size = _vocabulary(found, params, folder)
        said, notes = _sidecar(folder, params)
        config = to_config(params, vocab_size=vocab_size, **said.config)
        needed = architecture(config, said.mtp_config)
        left_out = _computed(found, params, folder)
        base_names = {name: meta_name_of_base(name) for name in needed.base}
        head_names = {name: meta_name_of_head(name) for name in needed.heads}
        shapes = {meta: needed.base[name] for name, meta in base_names.items()}
        shapes |= {meta: needed.heads[name] for name, meta in head_names.items()}
        unknown = sorted(found.keys() - shapes.keys() - {_FREQUENCIES})
        ranks = len(list(folder.glob(PATTERN)))
        where = str(folder) if ranks == 1 else f"{folder} (put together from {ranks} ranks: are there more?)"
        check_complete(found, shapes, where, unknown=unknown)
        return LazyModel(
            config=config,
            mtp_config=said.mtp_config,
            base={name: from_meta(meta, found[meta], params) for name, meta in base_names.items()},
            heads={name: from_meta(meta, found[meta], params) for name, meta in head_names.items()},
            base_name=said.base_name or folder.resolve().name,
            generation=read_generation(folder),
            left_out=left_out,
            notes=notes,
        )

    def prepare(self, model: LazyModel) -> LazyModel:
        """See `ModelFormat.prepare`: everything, or nothing."""
        other = unlike_the_paper(model.mtp_config)
        if other:
            raise IncompatibleModelError(
                f"facebook layout holds one decoder layer per offset, all on the trunk: got {', '.join(other)}; write it as "
                f"--to headway"
            )
        from_config(model.config, num_future_tokens=model.num_future_tokens)
        return model

    def write(self, model: LazyModel, folder: Path) -> tuple[str, ...]:
        """See `ModelFormat.write`."""
        params = from_config(model.config, num_future_tokens=model.num_future_tokens)
        notes = [
            f"{WEIGHTS_FILE} is a torch.save file, as this layout has it; share safetensors (--to headway) where you can"
        ]
        tensors = {meta_name_of_base(name): tensor for name, tensor in model.base.items()}
        if _OUTPUT not in tensors:
            tensors[_OUTPUT] = model.base[_EMBEDDING]
            notes.append(
                "the tied output matrix is written out, since the layout has no tying: it is a copy from now on"
            )
        tensors |= {meta_name_of_head(name): tensor for name, tensor in model.heads.items()}
        write_torch_file(
            folder / WEIGHTS_FILE, {name: to_meta(name, tensor, params) for name, tensor in tensors.items()}
        )
        _write_sidecar(model, folder)
        if model.generation is not None:
            write_generation(model.generation, folder)
        (folder / PARAMS_FILE).write_text(params.to_json(), encoding="utf-8")
        return tuple(notes)

    def logits(
        self, folder: Path, tokens_BT: Tensor, *, base: Path | None = None, change: WeightChange | None = None
    ) -> Tensor:
        """See `ModelFormat.logits`: a forward of the layout's own, which never meets Hugging Face's order of rows."""
        params = read_params(folder)
        return meta_logits(open_shards(folder, params), params, tokens_BT, change=change)


class _Said:
    """What a folder says beyond its tensors and sizes."""

    def __init__(self, mtp_config: MultiTokenConfig, config: Mapping[str, Any], base_name: str | None) -> None:
        self.mtp_config = mtp_config
        self.config = dict(config)
        self.base_name = base_name


def _vocabulary(found: Mapping[str, LazyTensor], params: FacebookParams, folder: Path) -> int:
    embedding = found.get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{folder} has no tok_embeddings.weight of two dimensions; restore its files", path=folder
        )
    rows = embedding.shape[0]
    if params.vocab_size is not None and params.vocab_size != rows:
        raise CheckpointError(
            f"{folder / PARAMS_FILE} says vocab_size={params.vocab_size}, tok_embeddings.weight has {rows} rows; restore "
            f"the file that does not belong here",
            path=folder,
        )
    return rows


def _computed(found: Mapping[str, LazyTensor], params: FacebookParams, folder: Path) -> tuple[str, ...]:
    """Llama 2's files hold the rotary frequencies, which both sides compute; they are left out if they agree."""
    if _FREQUENCIES not in found:
        return ()
    exact = params.rope_theta ** (-torch.arange(0, params.head_dim, 2, dtype=torch.float64) / params.head_dim)
    held = found[_FREQUENCIES].read().double()
    # Stored in the files' own precision: bfloat16 has 8 bits.
    if held.shape != exact.shape or not torch.allclose(held, exact, rtol=2**-7, atol=0.0):
        raise CheckpointError(
            f"{_FREQUENCIES} in {folder} are not those of rope_theta={params.rope_theta} in {PARAMS_FILE}: the model was "
            f"trained with others; correct rope_theta, or convert its Hugging Face version",
            path=folder,
        )
    return (f"{_FREQUENCIES}: the model computes them from rope_theta",)


def _sidecar(folder: Path, params: FacebookParams) -> tuple[_Said, tuple[str, ...]]:
    path = folder / SIDECAR_FILE
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            mtp_config = MultiTokenConfig.from_dict(record["multi_token"])
            config = {name: record["config"][name] for name in _SIDECAR_FIELDS}
            base_name = record["base_name"]
        except (ValueError, KeyError, TypeError, AttributeError, HeadwayError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); restore or delete it", path=path
            ) from error
        if mtp_config.num_future_tokens != params.n_future_tokens:
            raise CheckpointError(
                f"{path} is of a model with {mtp_config.num_future_tokens} future tokens, {PARAMS_FILE} says "
                f"{params.n_future_tokens}; delete the one that does not belong here",
                path=path,
            )
        return _Said(mtp_config, config, base_name), ()
    notes = []
    context = params.max_seq_len
    if context is None:
        context = CONTEXT_LENGTH
        notes.append(
            f"{PARAMS_FILE} does not say the longest context: max_position_embeddings={CONTEXT_LENGTH}, that of the "
            f"released models"
        )
    fields: dict[str, Any] = {"max_position_embeddings": context}
    if (folder / TOKENIZER_FILE).is_file():
        fields |= {"bos_token_id": LLAMA_BOS_ID, "eos_token_id": LLAMA_EOS_ID}
        notes.append(f"bos and eos are {LLAMA_BOS_ID} and {LLAMA_EOS_ID}, as in the Llama 2 tokenizer")
    else:
        notes.append("there is no tokenizer in the folder: config.json names no bos, eos or pad token")
    return _Said(MultiTokenConfig(num_future_tokens=params.n_future_tokens), fields, None), tuple(notes)


def _write_sidecar(model: LazyModel, folder: Path) -> None:
    record = {
        "base_name": model.base_name,
        "multi_token": model.mtp_config.to_dict(),
        "config": {name: getattr(model.config, name) for name in _SIDECAR_FIELDS},
        "provenance": {key: value for key, value in provenance().items() if key != "argv"},
    }
    (folder / SIDECAR_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
