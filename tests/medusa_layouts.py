"""Writes Medusa heads in both layouts and runs them without headway: the modules of their own trainers and engines.

Legend: B batch, T positions, N future tokens, V vocabulary, D width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


def trained_heads(
    base, num_heads: int, *, blocks: int = 1, own: bool = True, seed: int = 0, dtype: torch.dtype | None = None
) -> nn.ModuleList:
    """Random heads as the trainer of FasterDecoding builds them."""
    torch.manual_seed(seed)
    vocabulary, width = base.lm_head.weight.shape
    heads = nn.ModuleList()
    for _ in range(num_heads):
        parts: list[nn.Module] = [Residual(width) for _ in range(blocks)]
        if own:
            parts.append(nn.Linear(width, vocabulary, bias=False))
        heads.append(nn.Sequential(*parts))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    return heads.to(dtype or base.dtype)


def write_medusa(
    folder: Path,
    heads: nn.ModuleList,
    *,
    base: str | None = None,
    safetensors: bool = False,
    said: int | None = None,
    prefix: str = "",
) -> None:
    folder.mkdir(parents=True)
    state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in heads.state_dict().items()}
    if safetensors:
        save_file(state, folder / "medusa_lm_head.safetensors")
    else:
        torch.save(state, folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": said or len(heads), "medusa_num_layers": depth(heads)}
    if base is not None:
        config["base_model_name_or_path"] = base
    (folder / "config.json").write_text(json.dumps(config))


def write_engine(folder: Path, heads: nn.ModuleList, base, *, one_matrix: Tensor | None = None, **changes) -> None:
    """The layout that vLLM's Medusa class loads by its parameter names."""
    folder.mkdir(parents=True)
    state = {}
    for index, head in enumerate(heads):
        for block in range(depth(heads)):
            state[f"blocks.{index}.layers.{block}.weight"] = head[block].linear.weight.detach().clone()
            if changes.get("medusa_fc_bias", True):
                state[f"blocks.{index}.layers.{block}.bias"] = head[block].linear.bias.detach().clone()
        if one_matrix is None:
            state[f"lm_heads.{index}.weight"] = head[-1].weight.detach().clone()
    if one_matrix is not None:
        state["lm_heads.0.weight"] = one_matrix.detach().clone()
    vocabulary, width = base.lm_head.weight.shape
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": width,
        "vocab_size": vocabulary,
        "medusa_num_heads": len(heads),
        "medusa_num_layers": depth(heads),
        "medusa_fc_bias": True,
        "original_lm_head": one_matrix is not None,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(state, folder / "model.safetensors")


def depth(heads: nn.ModuleList) -> int:
    return sum(isinstance(part, Residual) for part in heads[0])


@torch.no_grad()
def forward(base, heads: nn.ModuleList, tokens_BT: Tensor, *, one_matrix: Tensor | None = None) -> Tensor:
    """Logits [B, T, N, V]: the base's own, then head after head on its last hidden state."""
    output = base(tokens_BT, output_hidden_states=True)
    hidden_BTD = output.hidden_states[-1]
    logits = [output.logits]
    for head in heads:
        result = head(hidden_BTD)
        if isinstance(head[-1], Residual):
            result = result @ (base.lm_head.weight if one_matrix is None else one_matrix).T
        logits.append(result)
    return torch.stack(logits, dim=2)
