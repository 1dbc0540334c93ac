"""Writes and runs checkpoints in Meta's layout without headway and without Hugging Face: the other side of the bridge.

Legend: B batch, T positions, N future tokens, V vocabulary, D width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 40
DEFAULTS = {
    "dim": 32,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": VOCABULARY,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "n_future_tokens": 4,
}


def hidden_width(params: dict) -> int:
    width = int(8 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    return (width + multiple - 1) // multiple * multiple


def random_state(params: dict, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dim, heads = params["dim"], params["n_heads"]
    kv_width = dim // heads * (params.get("n_kv_heads") or heads)
    inner = hidden_width(params)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    def gain() -> Tensor:
        return (1 + 0.2 * torch.randn(dim, generator=generator)).to(dtype)

    state = {
        "tok_embeddings.weight": matrix(VOCABULARY, dim),
        "norm.weight": gain(),
        "output.weight": matrix(VOCABULARY, dim),
    }
    future = params.get("n_future_tokens", 1)
    blocks = [f"layers.{i}" for i in range(params["n_layers"] - future + 1)]
    blocks += [f"extra_heads.{i}" for i in range(future - 1)]
    for block in blocks:
        state[f"{block}.attention.wq.weight"] = matrix(dim, dim)
        state[f"{block}.attention.wk.weight"] = matrix(kv_width, dim)
        state[f"{block}.attention.wv.weight"] = matrix(kv_width, dim)
        state[f"{block}.attention.wo.weight"] = matrix(dim, dim)
        state[f"{block}.feed_forward.w1.weight"] = matrix(inner, dim)
        state[f"{block}.feed_forward.w2.weight"] = matrix(dim, inner)
        state[f"{block}.feed_forward.w3.weight"] = matrix(inner, dim)
        state[f"{block}.attention_norm.weight"] = gain()
        state[f"{block}.ffn_norm.weight"] = gain()
    return state


def write_folder(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> dict[str, Tensor]:
    """A folder as the authors released them; a change to None leaves the parameter out."""
    params = {name: value for name, value in (DEFAULTS | changes).items() if value is not None}
    state = random_state(DEFAULTS | changes if "n_future_tokens" in params else params, dtype=dtype, seed=seed)
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(state, folder / "consolidated.00.pth")
    return state


def write_ranks(folder: Path, state: dict[str, Tensor], ranks: int, *, split_vocabulary: bool = False) -> None:
    """The same weights as Meta's model-parallel trainer leaves them, in place of the single file."""
    by_rows = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
    by_columns = ("wo.weight", "w2.weight")
    (folder / "consolidated.00.pth").unlink()
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            if name.endswith(by_rows) or (split_vocabulary and name.startswith("tok_")):
                part[name] = tensor.chunk(ranks, dim=0)[rank].clone()
            elif name.endswith(by_columns) or name.startswith("tok_"):
                part[name] = tensor.chunk(ranks, dim=1)[rank].clone()
            else:
                part[name] = tensor
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def forward(state: dict[str, Tensor], params: dict, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, N, V]; rotation by complex numbers, attention written out."""
    params = DEFAULTS | params
    heads = params["n_heads"]
    kv_heads = params["n_kv_heads"] or heads
    width = params["dim"] // heads
    batch, length = tokens_BT.shape
    speeds = 1.0 / params["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    turns = torch.polar(torch.ones(length, width // 2), torch.outer(torch.arange(length).float(), speeds))
    hidden_from_later = torch.full((length, length), float("-inf")).triu(1)

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * state[name]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], width // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    def block(x: Tensor, name: str) -> Tensor:
        y = rms(x, f"{name}.attention_norm.weight")
        q = rotated((y @ state[f"{name}.attention.wq.weight"].T).view(batch, length, heads, width))
        k = rotated((y @ state[f"{name}.attention.wk.weight"].T).view(batch, length, kv_heads, width))
        v = (y @ state[f"{name}.attention.wv.weight"].T).view(batch, length, kv_heads, width)
        group = torch.arange(heads) // (heads // kv_heads)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, group]) / width**0.5 + hidden_from_later
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, group]).reshape(batch, length, -1)
        x = x + mixed @ state[f"{name}.attention.wo.weight"].T
        y = rms(x, f"{name}.ffn_norm.weight")
        gate, up = y @ state[f"{name}.feed_forward.w1.weight"].T, y @ state[f"{name}.feed_forward.w3.weight"].T
        return x + (gate * gate.sigmoid() * up) @ state[f"{name}.feed_forward.w2.weight"].T

    future = params["n_future_tokens"] or 1
    trunk = state["tok_embeddings.weight"][tokens_BT]
    layers = params["n_layers"] - future + 1
    for index in range(layers - 1):
        trunk = block(trunk, f"layers.{index}")
    names = [f"layers.{layers - 1}", *(f"extra_heads.{index}" for index in range(future - 1))]
    outputs = [rms(block(trunk, name), "norm.weight") @ state["output.weight"].T for name in names]
    return torch.stack(outputs, dim=2)
