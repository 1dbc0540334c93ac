"""Decoding is the same whatever state the model is in, and leaves that state as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decoding_cases import base_continuation, ragged_batch
from headway.decoding.engine import ENGINE, decoding_context
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import random_tokens, tiny_base, tiny_model

NEW = 12


def test_a_model_in_training_decodes_without_dropout_and_stays_in_training():
    base = tiny_base("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=4, head_init="fresh"))
    row = random_tokens(1, 5)
    expected = base_continuation(model, row, NEW)
    model.train()
    model.heads[1].eval()
    modes = [module.training for module in model.modules()]
    assert model.generate(row, max_new_tokens=NEW)[0, 5:].tolist() == expected
    assert [module.training for module in model.modules()] == modes


def test_the_mode_is_restored_when_decoding_fails():
    model = tiny_model().train()

    def fail():
        with decoding_context(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("in the loop")

    with pytest.raises(RuntimeError, match="in the loop"):
        fail()
    assert all(module.training for module in model.modules())


def test_gradient_checkpointing_does_not_take_the_cache_away():
    model = tiny_model()
    batch = ragged_batch([4, 7], "lr")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW}
    expected = model.generate(batch.input_ids, **options)
    model.activation_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(batch.input_ids, **options), expected)
    assert model.training


def test_compiled_layers_decode_eagerly():
    model = tiny_model()
    batch = ragged_batch([4, 7], "lr")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW}
    expected = model.generate(batch.input_ids, **options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in [*model.family.layers, *model.heads]:
        layer.forward = torch.compile(layer.forward, backend=backend)
    assert torch.equal(model.generate(batch.input_ids, **options), expected)
    assert graphs == []
    model(random_tokens(1, 5), use_cache=False)
    assert graphs


def test_autograd_is_off_inside_and_results_can_be_trained_on():
    model = tiny_model()
    seen = []
    hook = model.family.last_layer.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    out = model.generate(random_tokens(1, 5), max_new_tokens=4)
    hook.remove()
    assert not any(seen)
    assert torch.is_grad_enabled()
    assert not out.is_inference()
    # Training on generated text saves the ids for backward, which inference tensors do not allow.
    model(out, labels=out).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_other_contexts(context):
    model, row = tiny_model(), random_tokens(1, 5)
    with context():
        out = model.generate(row, max_new_tokens=NEW)
    assert out[0, 5:].tolist() == base_continuation(model, row, NEW)


def test_the_cache_is_allocated_once_for_prompt_new_tokens_and_one_draft_in_the_models_dtype():
    model = tiny_model("llama-gqa-tied", dtype=torch.bfloat16)
    batch = ragged_batch([4, 7], "lr")
    loop = ENGINE.start(model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=10)
    with decoding_context(model):
        loop.step()
        places = [layer.keys.data_ptr() for layer in loop.executor.cache.layers]
        loop.run()
    layers = loop.executor.cache.layers
    assert len(layers) == 3 + 3
    assert {tuple(layer.keys.shape) for layer in layers} == {(2, 2, 7 + 10 + 3, 8)}
    assert {layer.values.dtype for layer in layers} == {torch.bfloat16}
    assert [layer.keys.data_ptr() for layer in layers] == places


def test_short_texts_do_not_read_the_whole_capacity():
    model = tiny_model()
    widths = []

    def note(module, args, kwargs):
        mask = kwargs["attention_mask"]
        widths.append(None if mask is None else mask.shape[-1])

    hook = model.family.last_layer.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(random_tokens(1, 5), max_new_tokens=200, eos_token_id=list(range(20)))
    hook.remove()
    # The prefill has no mask at all; blocks see what has been written so far.
    assert widths[0] is None
    assert all(width is not None and width < 60 for width in widths[1:5])


def test_reading_prompts_makes_no_logits_but_the_last():
    model = tiny_model()
    rows = []
    hook = model.family.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    model.generate(random_tokens(2, 50), max_new_tokens=2)
    hook.remove()
    assert max(rows) <= 2 * 3


def test_a_model_without_generation_defaults_uses_its_own_end_tokens():
    model = tiny_model()
    assert isinstance(model.base, nn.Module)
    row = random_tokens(1, 5)
    truth = base_continuation(model, row, NEW)
    model.generation_config.eos_token_id = truth[3]
    try:
        out = model.generate(row, max_new_tokens=NEW)
        assert out[0, 5:].tolist() == truth[: truth.index(truth[3]) + 1]
    finally:
        model.generation_config.eos_token_id = None
