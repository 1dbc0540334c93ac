"""Parameters, initial values and options of every architecture are what its definition says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from head_cases import ARCHITECTURES, CHANGES_BASE, IN_TURN, MARKOV, WITH_CACHE, head_model
from headway.errors import ConfigError
from headway.heads.base import Heads
from headway.heads.options import OPTIONS_OF
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.memory import model_footprint
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import FAMILIES, VOCABULARY, random_tokens, tiny_base, tiny_model

D, V = 32, VOCABULARY
TOKENS = random_tokens(2, 10)


def layer_size(model) -> int:
    return sum(p.numel() for p in model.family.last_layer.parameters())


def expected_parameters(name, model, heads):
    options = ARCHITECTURES[name]
    kind, layer = options.get("heads", "transformer"), layer_size(model)
    markov = 2 * V * options.get("markov_rank", 0)
    own = V * D * heads if options.get("own_unembedding") is not False else 0
    square = D * D + D
    blocks = options.get("blocks_per_head", 1)
    if kind == "transformer":
        return heads * layer * options.get("layers_per_head", 1) + markov
    if kind == "linear":
        return heads * D * D + markov
    if kind == "replicated_unembedding":
        return own + markov
    if kind == "medusa":
        return heads * blocks * square + own + markov
    if kind == "hydra":
        inputs = sum(offset * D for offset in range(2, heads + 2))
        return inputs * D + (inputs * D + heads * D) + heads * (blocks - 1) * square + own
    norm = sum(p.numel() for p in model.family.norm.parameters())
    module = layer + 2 * D * D + 2 * norm + (norm if options.get("own_output_norm") else 0)
    fusion = 3 * D * D if options.get("fuse_layers") else 0
    return (module if options.get("share_modules") else heads * module) + fusion


@pytest.mark.parametrize("num_future_tokens", [2, 5])
@pytest.mark.parametrize("family", ["llama-gqa-tied", "gpt2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_definition(name, family, num_future_tokens):
    model = tiny_model(family, num_future_tokens=num_future_tokens, **ARCHITECTURES[name])
    assert isinstance(model.heads, Heads)
    found = [p for key, p in model.named_parameters() if key.startswith("heads.")]
    assert sum(p.numel() for p in found) == expected_parameters(name, model, num_future_tokens - 1)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(p.requires_grad for p in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_every_head_gets_a_gradient_from_the_start(name, family):
    model = tiny_model(family, **ARCHITECTURES[name])
    model(TOKENS, labels=TOKENS).loss.backward()
    for key, parameter in model.heads.named_parameters():
        assert parameter.grad is not None, key
        # A key bias shifts all scores of a query alike; its gradient is rounding.
        if not key.endswith(("k_proj.bias", "attention.query_key_value.bias")):
            assert float(parameter.grad.abs().max()) > 0, key


@pytest.mark.parametrize("name", ["linear", "replicated", "medusa", "hydra", "hydra-2-blocks-shared"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text-capped", "gpt2"])
def test_heads_that_start_from_the_base_start_as_the_next_token_head(name, family):
    model = tiny_model(family, head_init="copy", **ARCHITECTURES[name])
    with torch.no_grad():
        logits = model(TOKENS, return_future_logits=True).future_logits
    for offset in (2, 3, 4):
        gap = (logits[:, :, offset - 1] - logits[:, :, 0]).abs().nan_to_num()
        assert float(gap.max()) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_from_a_config_gives_up_the_layers_that_its_heads_have(name):
    options = ARCHITECTURES[name]
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 7
    mtp = MultiTokenConfig(num_future_tokens=4, **(options | {"allow_base_change": False}))
    model = MultiTokenLM.from_config(config, mtp)
    layers = len(model.heads.decoder_layers)
    assert layers == mtp.num_decoder_layers
    assert model.config.num_hidden_layers == 7 - layers
    if name in ("transformer", "transformer-2-layers", "causal", "anticausal"):
        assert model.num_parameters() == AutoModelForCausalLM.from_config(config).num_parameters()
    whole = MultiTokenLM.from_config(config, mtp, shorten_trunk=False)
    assert whole.config.num_hidden_layers == 7
    assert whole.eval()(TOKENS, return_future_logits=True).future_logits.shape == (2, 10, 4, V)


def test_more_head_layers_than_layers_are_refused_with_the_number_that_fits():
    mtp = MultiTokenConfig(num_future_tokens=3, layers_per_head=2)
    with pytest.raises(ConfigError, match="lower num_future_tokens to 2"):
        MultiTokenLM.from_config(FAMILIES["llama"](), mtp)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_thirty_two_future_tokens_train(name):
    model = tiny_model(num_future_tokens=32, **ARCHITECTURES[name])
    tokens = random_tokens(1, 40)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert output.loss_per_offset.shape == (32,)
    assert bool((output.loss_per_offset > 0).all())
    assert all(float(p.grad.abs().max()) > 0 for p in model.heads.parameters())


def test_heads_of_a_changed_base_need_leave():
    with pytest.raises(ConfigError, match="allow_base_change=True"):
        attach_heads(tiny_base("llama"), MultiTokenConfig(num_future_tokens=2, wiring="anticausal"))
    base = tiny_base("llama")
    expected = base(TOKENS).logits
    model = attach_heads(base, MultiTokenConfig(num_future_tokens=3, wiring="anticausal", allow_base_change=True))
    assert float((model(TOKENS).logits - expected).abs().max()) > 1e-3
    # One future token leaves nothing between trunk and last layer.
    plain = attach_heads(base, MultiTokenConfig(num_future_tokens=1, wiring="anticausal"))
    assert torch.equal(plain(TOKENS).logits, expected)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - CHANGES_BASE))
def test_offset_1_stays_bit_equal_to_the_base(name):
    model = head_model(name)
    assert torch.equal(model(TOKENS, return_future_logits=True).future_logits[:, :, 0], model.base(TOKENS).logits)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"heads": "hydras"}, "did you mean hydra"),
        ({"wiring": "diagonal"}, "parallel, causal, anticausal"),
        ({"fuse_layers": True}, "only sequential"),
        ({"heads": "sequential", "fuse_layers": True, "tap_back": 1}, "leave one of them out"),
        ({"heads": "linear", "wiring": "causal"}, "only transformer can have it"),
        ({"heads": "medusa", "layers_per_head": 2}, "layers_per_head=2 means nothing for heads='medusa'"),
        ({"blocks_per_head": 2}, "only medusa, hydra"),
        ({"heads": "hydra", "markov_rank": 4}, "markov_rank=4 means nothing for heads='hydra'"),
        ({"heads": "linear", "own_unembedding": True}, "only medusa, hydra"),
        ({"share_modules": True}, "only sequential"),
        ({"tap_back": 1, "wiring": "causal"}, "needs wiring='parallel'"),
        ({"allow_base_change": True}, "belongs to wiring='anticausal'"),
        ({"tap_back": -1}, "tap_back must be a whole number >= 0"),
        ({"layers_per_head": 0}, "layers_per_head must be a whole number >= 1"),
        ({"markov_rank": 2.5}, "markov_rank must be a whole number"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(fields, match):
    with pytest.raises(ConfigError, match=match):
        MultiTokenConfig(num_future_tokens=3, **fields)


def test_a_tap_before_the_first_layer_is_refused():
    with pytest.raises(ConfigError, match="pass at most 2"):
        tiny_model(tap_back=3)
    tiny_model(tap_back=2)
    shallow = tiny_base("llama", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="a base of 2"):
        attach_heads(shallow, MultiTokenConfig(num_future_tokens=2, heads="sequential", fuse_layers=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_option_round_trips_through_a_dictionary(name):
    config = MultiTokenConfig(num_future_tokens=4, **ARCHITECTURES[name])
    assert MultiTokenConfig.from_dict(config.to_dict()) == config
    assert OPTIONS_OF.keys() >= {config.heads}


@pytest.mark.parametrize("name", sorted(IN_TURN | MARKOV))
def test_heads_that_read_tokens_refuse_embeddings_alone(name):
    model = head_model(name)
    embedded = model.get_input_embeddings()(TOKENS)
    with pytest.raises(ConfigError, match="pass input_ids"):
        model(inputs_embeds=embedded, return_future_logits=True)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", sorted(WITH_CACHE & IN_TURN))
def test_sequential_heads_refuse_to_continue_a_growing_cache(name):
    model, cache = head_model(name), DynamicCache()
    model(TOKENS, past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match="use generate"):
        model(TOKENS[:, :2], past_key_values=cache, use_cache=True, return_future_logits=True)


def test_a_vocabulary_of_another_size_does_not_fit_heads_that_have_one_themselves():
    for name in ("medusa", "transformer-markov"):
        with pytest.raises(ConfigError, match="resize the base first"):
            head_model(name).resize_token_embeddings(V + 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_footprint_counts_layers_cache_and_parameters_as_the_model_has_them(name):
    model = tiny_model(**ARCHITECTURES[name])
    size = model_footprint(model, dtype=torch.float32)
    assert size.total_parameters == model.num_parameters()
    assert size.head_parameters == expected_parameters(name, model, 3)
    assert size.layers - size.head_layers == 3
    assert size.cache.layers == 3 + model.heads.cache_layers(3)
    assert size.embedding_parameters == size.unembedding_parameters == V * D
