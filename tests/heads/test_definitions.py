"""Logits, loss and gradients of every architecture are those of its formula, written here once more in plain terms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from head_cases import ARCHITECTURES, CHANGES_BASE, IN_TURN, MARKOV, PlainLayers, head_model
from tiny_models import random_tokens

FAMILIES = ["llama", "llama-gqa-tied", "qwen3", "gemma3_text-capped", "gpt2"]
TOKENS = random_tokens(2, 11)


def plain_logits(name, model, tokens):
    """[B, T, V] per offset from the formulas; positions without the tokens they need hold anything."""
    options = ARCHITECTURES[name]
    kind, count = options.get("heads", "transformer"), model.num_future_tokens - 1
    family, heads, run = model.family, model.heads, PlainLayers(model.base)
    states = _residuals(model, tokens)
    z, last, norm = states[-1], family.layers[-1], family.norm
    embedded = model.base.get_input_embeddings()(tokens)
    after = [torch.roll(embedded, -ahead, dims=1) for ahead in range(count + 1)]  # after[j][t] = e(x_{t+j})
    shared = family.lm_head.weight

    def stack(body, x):
        for layer in body if isinstance(body, torch.nn.ModuleList) else [body]:
            x = run(layer, x)
        return x

    residual = run(last, z)
    hidden, weights = [norm(residual)], [shared] * (count + 1)
    # What heads on the final hidden state read: of layer L, or of L - j with a tap.
    read = norm([*states, residual][-1 - options.get("tap_back", 0)])
    if heads.unembeddings is not None:
        weights = [shared, *(matrix.weight for matrix in heads.unembeddings)]
    if name.startswith("causal"):
        x = residual
        for body in heads:
            x = stack(body, x)
            hidden.append(norm(x))
    elif name in CHANGES_BASE:
        x, farthest_first = z, []
        for body in reversed(list(heads)):
            x = stack(body, x)
            farthest_first.append(norm(x))
        hidden = [norm(run(last, x)), *reversed(farthest_first)]
    elif kind == "transformer":
        z = states[-1 - options.get("tap_back", 0)]
        hidden += [norm(stack(body, z)) for body in heads]
    elif kind == "linear":
        source = [*states, residual][-1 - options.get("tap_back", 0)]
        hidden += [norm(source @ body.weight.T) for body in heads]
    elif kind == "replicated_unembedding":
        hidden += [read] * count
    elif kind == "medusa":
        for body in heads:
            x = read
            for block in body:
                x = x + F.silu(x @ block.inner.weight.T + block.inner.bias)
            hidden.append(x)
    elif kind == "hydra":
        for index, body in enumerate(heads):
            u = torch.cat([read, *after[1 : index + 2]], dim=-1)
            x = u @ body.skip.weight.T + F.silu(u @ body.inner.weight.T + body.inner.bias)
            for block in body.blocks:
                x = x + F.silu(x @ block.inner.weight.T + block.inner.bias)
            hidden.append(x)
    else:
        x = read
        if options.get("fuse_layers"):
            x = torch.cat(states[:3], dim=-1) @ heads.fusion.weight.T
        for depth in range(1, count + 1):
            module = heads[0] if options.get("share_modules") else heads[depth - 1]
            both = torch.cat([module.hidden_norm(x), module.embedding_norm(after[depth])], dim=-1)
            x = run(module.layer, both @ module.projection.weight.T)
            x = module.output_norm(x) if options.get("own_output_norm") else x
            hidden.append(x if options.get("own_output_norm") else norm(x))
    logits = [h @ weight.T for h, weight in zip(hidden, weights, strict=True)]
    if heads.markov is not None:
        for offset in range(2, count + 2):
            previous = torch.roll(tokens, 1 - offset, dims=1)
            bias = heads.markov.previous.weight[previous] @ heads.markov.to_logits.weight.T
            logits[offset - 1] = logits[offset - 1] + bias
    return [family.soft_cap(values) for values in logits]


def _residuals(model, tokens):
    """Inputs of the base's layers, the last layer's at the end."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
        for layer in model.family.layers
    ]
    model.family.decoder(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def plain_loss(per_offset, tokens):
    return sum(
        F.cross_entropy(logits[:, :-offset].flatten(0, 1), tokens[:, offset:].flatten())
        for offset, logits in enumerate(per_offset, start=1)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_every_gradient_are_those_of_the_formula(name, family):
    model = head_model(name, family, dtype=torch.float64)
    # GPT-2 computes everything in float64, the norms of the others in float32.
    limit = 1e-11 if family == "gpt2" else 2e-6
    parameters = list(model.parameters())
    expected = plain_loss(plain_logits(name, model, TOKENS), TOKENS)
    wanted = torch.autograd.grad(expected, parameters)
    loss = model(TOKENS, labels=TOKENS).loss
    assert loss.item() == pytest.approx(expected.item(), rel=limit)
    found = torch.autograd.grad(loss, parameters)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for (parameter_name, _), gradient, reference in zip(model.named_parameters(), found, wanted, strict=True):
        assert float((gradient - reference).abs().max()) <= limit * scale, parameter_name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_future_logits_are_those_of_the_formula_and_nan_where_a_needed_token_does_not_exist(name):
    model = head_model(name, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_logits(name, model, TOKENS)
        found = model(TOKENS, return_future_logits=True).future_logits
    length = TOKENS.shape[1]
    for offset in range(1, 5):
        exists = length - offset + 1 if name in IN_TURN | MARKOV else length
        gap = found[:, :exists, offset - 1] - expected[offset - 1][:, :exists]
        assert float(gap.abs().max()) < 1e-5, offset
        assert bool(found[:, exists:, offset - 1].isnan().all()), offset


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_does_not_depend_on_how_it_is_cut_into_chunks(name):
    model = head_model(name, dtype=torch.float64)
    whole = torch.autograd.grad(model(TOKENS, labels=TOKENS).loss, list(model.parameters()))
    model.mtp_config = type(model.mtp_config).from_dict(model.mtp_config.to_dict() | {"loss_chunk_tokens": 3})
    cut = torch.autograd.grad(model(TOKENS, labels=TOKENS).loss, list(model.parameters()))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True)) < 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_do_not_touch_each_other_at_any_offset(name):
    model = head_model(name, dtype=torch.float64)
    first, second = random_tokens(1, 6, seed=3), random_tokens(1, 7, seed=4)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, return_future_logits=True).future_logits
        alone = [model(row, return_future_logits=True).future_logits for row in (first, second)]
    gap = (together - torch.cat(alone, dim=1)).abs()
    assert bool((together.isnan() == torch.cat(alone, dim=1).isnan()).all())
    assert float(gap.nan_to_num().max()) < 1e-5
