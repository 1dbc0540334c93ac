"""Writes and runs dense checkpoints with sequential modules in the layouts of released ones, in plain torch alone.

Legend: B batch, T positions, N future tokens, V vocabulary, D width, H heads.

Layouts: "mimo" (XiaomiMiMo/MiMo-7B), "deepseek" (appended layers with enorm, hnorm, eh_proj, shared_head), "qwen" (mtp.fc).
The order of the projection's input is written out where it is used: MiMo takes [hidden; embedding], the others the reverse.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 40, 32, 48, 3, 4, 2
HEAD = WIDTH // HEADS
EPS, THETA = 1e-5, 10000.0

CONFIGS = {
    "mimo": {
        "model_type": "mimo",
        "architectures": ["MiMoForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "attention_bias": True,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
        "num_nextn_predict_layers": 1,
    },
    "deepseek": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_nextn_predict_layers": 2},
    "qwen": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": HEAD,
        "mtp_num_hidden_layers": 1,
        "attention_bias": False,
    },
}
_NAMES = {
    "mimo": ("model.mtp_layers.{k}", "", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "deepseek": ("model.layers.{appended}", "", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "qwen": ("mtp", ".layers.0", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}


def module_names(layout: str, k: int) -> tuple[str, str, str, str, str, str]:
    """Prefix, prefix of the block, and the names of embedding norm, hidden norm, projection, output norm."""
    top, block, *parts = _NAMES[layout]
    top = top.format(k=k, appended=LAYERS + k)
    embedding, hidden, projection, output = (f"{top}.{part}.weight" for part in parts)
    return top, top + block, embedding, hidden, projection, output


def num_modules(layout: str) -> int:
    return int(CONFIGS[layout].get("num_nextn_predict_layers", 1))


def random_state(layout: str, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    def gain(size: int = WIDTH) -> Tensor:
        return 1 + matrix(size)

    def block(prefix: str) -> dict[str, Tensor]:
        kv = HEAD * KV_HEADS
        shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (kv, WIDTH), "v_proj": (kv, WIDTH), "o_proj": (WIDTH, WIDTH)}
        made = {f"{prefix}.self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        if layout == "mimo":
            made |= {f"{prefix}.self_attn.{name}_proj.bias": matrix(shapes[f"{name}_proj"][0]) for name in "qkv"}
        if layout == "qwen":
            made |= {f"{prefix}.self_attn.{name}_norm.weight": gain(HEAD) for name in "qk"}
        made |= {f"{prefix}.mlp.{name}_proj.weight": matrix(INNER, WIDTH) for name in ("gate", "up")}
        made[f"{prefix}.mlp.down_proj.weight"] = matrix(WIDTH, INNER)
        return made | {f"{prefix}.{name}_layernorm.weight": gain() for name in ("input", "post_attention")}

    state = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "lm_head.weight": matrix(VOCABULARY, WIDTH)}
    state["model.norm.weight"] = gain()
    for layer in range(LAYERS):
        state |= block(f"model.layers.{layer}")
    for k in range(num_modules(layout)):
        top, inside, embedding, hidden, projection, output = module_names(layout, k)
        state |= block(inside) | {name: gain() for name in (embedding, hidden, output)}
        state[projection] = matrix(WIDTH, 2 * WIDTH)
        if layout == "deepseek":
            state[f"{top}.shared_head.head.weight"] = state["lm_head.weight"].clone()
            state[f"{top}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    return state


def write_folder(folder: Path, layout: str, *, state: dict[str, Tensor] | None = None, **changes) -> dict[str, Tensor]:
    state = random_state(layout) if state is None else state
    folder.mkdir(parents=True)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[layout] | changes))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def forward(state: dict[str, Tensor], layout: str, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, N, V]; NaN where an offset needs tokens after the end."""
    hidden_BTD = state["model.embed_tokens.weight"][tokens_BT]
    for layer in range(LAYERS):
        hidden_BTD = _block(state, f"model.layers.{layer}", hidden_BTD)
    hidden_BTD = _norm(hidden_BTD, state["model.norm.weight"])
    logits = [hidden_BTD @ state["lm_head.weight"].T]
    for k in range(num_modules(layout)):
        _, inside, embedding, hidden, projection, output = module_names(layout, k)
        following = tokens_BT[:, k + 1 :]
        e = _norm(state["model.embed_tokens.weight"][following], state[embedding])
        h = _norm(hidden_BTD[:, : following.shape[1]], state[hidden])
        joined = torch.cat((h, e) if layout == "mimo" else (e, h), dim=-1)
        hidden_BTD = _norm(_block(state, inside, joined @ state[projection].T), state[output])
        ends = hidden_BTD.new_full((tokens_BT.shape[0], k + 1, VOCABULARY), float("nan"))
        logits.append(torch.cat((hidden_BTD @ state["lm_head.weight"].T, ends), dim=1))
    return torch.stack(logits, dim=2)


def _norm(hidden: Tensor, gain: Tensor) -> Tensor:
    return gain * hidden / (hidden.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def _block(state: dict[str, Tensor], prefix: str, hidden_BTD: Tensor) -> Tensor:
    batch, positions, _ = hidden_BTD.shape
    inner = _norm(hidden_BTD, state[f"{prefix}.input_layernorm.weight"])

    def heads(name: str) -> Tensor:
        weight = state[f"{prefix}.self_attn.{name}_proj.weight"]
        made = F.linear(inner, weight, state.get(f"{prefix}.self_attn.{name}_proj.bias"))
        made = made.view(batch, positions, -1, HEAD)
        gain = state.get(f"{prefix}.self_attn.{name}_norm.weight")
        return (made if gain is None else _norm(made, gain)).transpose(1, 2)

    keys, values = (heads(name).repeat_interleave(HEADS // KV_HEADS, dim=1) for name in "kv")
    scores = _rotated(heads("q")) @ _rotated(keys).transpose(2, 3) / HEAD**0.5
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ values
    mixed = mixed.transpose(1, 2).reshape(batch, positions, -1)
    hidden_BTD = hidden_BTD + mixed @ state[f"{prefix}.self_attn.o_proj.weight"].T
    inner = _norm(hidden_BTD, state[f"{prefix}.post_attention_layernorm.weight"])
    gate, up, down = (state[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return hidden_BTD + (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T


def _rotated(heads_BHTd: Tensor) -> Tensor:
    positions = torch.arange(heads_BHTd.shape[2], dtype=torch.float32)
    angles = positions[:, None] * THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD)
    first, second = heads_BHTd.chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1)
