"""Sequential modules computed apart from `headway.heads`.

Legend: B batch, T positions, N future tokens, V vocabulary, D width, k module.

Offset k + 2 at position t needs the tokens up to t + k + 1; its logits are NaN where the text has none.

Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from headway.convert.lazy_model import LazyTensor, WeightChange
from headway.convert.plain_folder import change_weights
from headway.convert.sequential.tensors import SequentialTensors

Deepen = Callable[[int, Tensor, Tensor], Tensor]
"""(module, hidden states [B, W, D] of depth before it, tokens [B, W] in between) -> hidden states ready for the unembedding."""


@torch.no_grad()
def transformers_logits(causal_lm: Any, tokens_BT: Tensor, *, change: WeightChange | None) -> Tensor:
    """Logits [B, T, N, V] with transformers' own modules, the ones that `generate(use_mtp=True)` drafts with.

    Args:
        causal_lm: loaded from the folder.
        tokens_BT: token ids.
        change: applied to every weight.
    """
    modules: Any = MtpModel.from_pretrained(causal_lm).eval()
    change_weights(modules.layers, change)
    change_weights(causal_lm, change)
    cache = MtpCache(config=causal_lm.config.get_mtp_config())

    def deepen(module: int, hidden_BWD: Tensor, tokens_BW: Tensor) -> Tensor:
        positions_BW = torch.arange(module + 1, module + 1 + tokens_BW.shape[1]).expand_as(tokens_BW)
        return cast(Tensor, modules.forward_layer(module, hidden_BWD, positions_BW, cache, input_ids=tokens_BW))

    return _teacher_forced(causal_lm, tokens_BT, len(modules.layers), deepen)


@torch.no_grad()
def native_logits(
    causal_lm: Any, tensors: SequentialTensors, tokens_BT: Tensor, *, change: WeightChange | None
) -> Tensor:
    """Logits [B, T, N, V] from the file's tensors, their columns in the file's order.

    Args:
        causal_lm: the base, loaded from the folder.
        tensors: of the modules.
        tokens_BT: token ids.
        change: applied to every weight, in float32, before it is used.
    """
    change_weights(causal_lm, change)

    def filled(module: nn.Module, values: Mapping[str, LazyTensor], prefix: str) -> nn.Module:
        own = copy.deepcopy(module)
        state = {name: values[f"{prefix}.{name}"].read().float() for name in own.state_dict()}
        own.load_state_dict({name: value if change is None else change(value) for name, value in state.items()})
        return own

    last = causal_lm.model.layers[-1]
    projection = nn.Linear(2 * causal_lm.config.hidden_size, causal_lm.config.hidden_size, bias=False)

    def deepen(module: int, hidden_BWD: Tensor, tokens_BW: Tensor) -> Tensor:
        values = tensors.modules[module]
        norm = causal_lm.model.norm
        embedded_BWD = filled(norm, values, "embedding_norm")(causal_lm.model.embed_tokens(tokens_BW))
        hidden_BWD = filled(norm, values, "hidden_norm")(hidden_BWD)
        both = (hidden_BWD, embedded_BWD) if tensors.hidden_first else (embedded_BWD, hidden_BWD)
        hidden_BWD = filled(projection, values, "projection")(torch.cat(both, dim=-1))
        arguments = _arguments_of_last_layer(causal_lm, tokens_BW)
        output = filled(last, values, "layer")(hidden_BWD, **arguments)
        return cast(Tensor, filled(norm, values, "output_norm")(output[0] if isinstance(output, tuple) else output))

    return _teacher_forced(causal_lm, tokens_BT, len(tensors.modules), deepen)


def _arguments_of_last_layer(causal_lm: Any, tokens_BW: Tensor) -> dict[str, Any]:
    """Mask and rotary embeddings as the family's own forward builds them for so many tokens."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = causal_lm.model.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        causal_lm.model(tokens_BW, use_cache=False)
    finally:
        handle.remove()
    return seen


def _teacher_forced(causal_lm: Any, tokens_BT: Tensor, num_modules: int, deepen: Deepen) -> Tensor:
    output = causal_lm(tokens_BT, output_hidden_states=True, use_cache=False)
    hidden_BWD = output.hidden_states[-1]
    logits = [output.logits]
    for module in range(num_modules):
        following_BW = tokens_BT[:, module + 1 :]
        hidden_BWD = deepen(module, hidden_BWD[:, : following_BW.shape[1]], following_BW)
        padded_BTV = torch.full_like(output.logits, float("nan"))
        padded_BTV[:, : following_BW.shape[1]] = causal_lm.lm_head(hidden_BWD)
        logits.append(padded_BTV)
    return torch.stack(logits, dim=2)
