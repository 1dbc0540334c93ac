"""What the decoding engine relies on in transformers beyond its documented interface, one test per behaviour.

An upgrade that changes one of them fails here, with the place in headway that has to follow, and not in users' hands.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headway.decoding.cache import RaggedCache, RaggedLayer, attention_windows
from headway.decoding.lean.layer import RMSNorm
from headway.decoding.masks import BlockMasks
from headway.decoding.prompts import infer_mask
from headway.decoding.refusals import _HARMLESS, check_prepared
from headway.errors import DecodingError
from headway.functional.tree import Tree
from tiny_models import FAMILIES, VOCABULARY, random_tokens, tiny_base

LEAN = [name for name in FAMILIES if name.split("-")[0] in ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")]
ROTARY = [name for name in FAMILIES if name != "gpt2"]


class ReachedError(Exception):
    """Raised in place of a decoding loop, to look at what it would have been given."""


def prepared(monkeypatch, base, input_ids, **kwargs):
    """What transformers' `generate` hands to `_sample`."""
    given = {}

    def sample(self, *args, **named):
        given.update(inspect.signature(original).bind(self, *args, **named).arguments)
        raise ReachedError

    original = type(base)._sample
    monkeypatch.setattr(type(base), "_sample", sample)
    with pytest.raises(ReachedError):
        base.generate(input_ids, **kwargs)
    return given


# ------------------------------------------------------------------------------------------------ generate and _sample


def test_sample_takes_what_the_engine_names():
    parameters = inspect.signature(GenerationMixin._sample).parameters
    expected = [
        "self",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "model_kwargs",
    ]
    assert list(parameters) == expected, (
        "MultiTokenLM._sample and Engine.sample (decoding/engine.py) override GenerationMixin._sample with these arguments"
    )


@pytest.mark.parametrize("mode", [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE])
def test_greedy_and_sampled_decoding_both_come_to_sample(mode):
    assert GENERATION_MODES_MAPPING[mode] == "_sample", (
        "decoding/engine.py is reached through _sample alone, for greedy decoding and for sampling"
    )


def test_there_is_no_way_to_decode_that_nobody_here_has_heard_of():
    known = {"GREEDY_SEARCH", "SAMPLE", "ASSISTED_GENERATION", "DOLA_GENERATION", "CONTRASTIVE_SEARCH", "BEAM_SEARCH"}
    known |= {"BEAM_SAMPLE", "CONSTRAINED_BEAM_SEARCH", "GROUP_BEAM_SEARCH", "MTP"}
    assert {mode.name for mode in GENERATION_MODES_MAPPING} <= known, (
        "decoding/refusals.py refuses by name what is not greedy decoding or sampling; a new mode needs an entry there"
    )


def test_the_pad_token_is_a_tensor_of_the_configuration(monkeypatch):
    base = tiny_base("llama")
    given = prepared(monkeypatch, base, random_tokens(1, 4), max_new_tokens=2, pad_token_id=7)
    assert int(given["generation_config"]._pad_token_tensor) == 7, (
        "Engine._loop reads what to fill ended rows with from generation_config._pad_token_tensor"
    )
    monkeypatch.undo()
    given = prepared(monkeypatch, base, random_tokens(1, 4), max_new_tokens=2)
    assert given["generation_config"]._pad_token_tensor is None, (
        "Engine._loop takes None in generation_config._pad_token_tensor for 'no pad token'"
    )


def test_the_limit_is_a_criterion_that_counts_the_prompt(monkeypatch):
    given = prepared(monkeypatch, tiny_base("llama"), random_tokens(2, 4), max_new_tokens=5, pad_token_id=0)
    limits = [item.max_length for item in given["stopping_criteria"] if isinstance(item, MaxLengthCriteria)]
    assert limits == [4 + 5], (
        "Engine._loop takes max_new_tokens from MaxLengthCriteria.max_length less the prompt's columns"
    )


def test_the_ends_are_a_criterion_with_a_tensor_of_ids(monkeypatch):
    given = prepared(
        monkeypatch, tiny_base("llama"), random_tokens(1, 4), max_new_tokens=5, eos_token_id=[3, 8], pad_token_id=0
    )
    ends = [item.eos_token_id.tolist() for item in given["stopping_criteria"] if isinstance(item, EosTokenCriteria)]
    assert ends == [[3, 8]], "Engine._loop takes the ids that end a text from EosTokenCriteria.eos_token_id"
    kinds = {type(item) for item in given["stopping_criteria"]}
    assert kinds == {MaxLengthCriteria, EosTokenCriteria}, (
        "Engine._loop takes its fast path when there are only limit and ends, which are always these two classes"
    )


def test_nothing_arrives_beside_what_the_engine_may_ignore(monkeypatch):
    ids = random_tokens(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    given = prepared(monkeypatch, tiny_base("llama"), ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    carried = {name for name, value in given["model_kwargs"].items() if value is not None and value is not False}
    assert carried <= _HARMLESS, (
        "refusals.check_leftovers refuses forward arguments it does not know; transformers prepares another one by itself"
    )
    assert torch.equal(given["model_kwargs"]["attention_mask"], mask), (
        "Engine.sample reads the padding from model_kwargs['attention_mask'] as the caller passed it"
    )


@pytest.mark.parametrize("padding", [True, False])
def test_a_mask_is_inferred_from_pad_ids_as_we_infer_it(padding, monkeypatch):
    ids = torch.tensor([[0, 5, 0, 6], [3, 4, 5, 6]])
    ends = [2] if padding else [2, 0]
    given = prepared(
        monkeypatch, tiny_base("llama"), ids, max_new_tokens=2, pad_token_id=0, eos_token_id=ends, do_sample=False
    )
    ours = infer_mask(ids, pad_token_id=0, eos_token_ids=ends)
    theirs = given["model_kwargs"].get("attention_mask")
    assert torch.equal(
        torch.ones_like(ids) if ours is None else ours, torch.ones_like(ids) if theirs is None else theirs.long()
    ), "prompts.infer_mask infers a missing mask as GenerationMixin._prepare_attention_mask_for_generation does"


def test_several_samples_stand_row_by_row(monkeypatch):
    ids = random_tokens(2, 4)
    given = prepared(
        monkeypatch,
        tiny_base("llama"),
        ids,
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=3,
        pad_token_id=0,
    )
    assert torch.equal(given["input_ids"], ids.repeat_interleave(3, dim=0)), (
        "Engine._as_given puts the caller's prompts beside rows repeated with repeat_interleave"
    )


class Recording:
    """A streamer."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_the_streamer_has_the_prompt_and_is_ours_to_end(monkeypatch):
    streamer, ids = Recording(), random_tokens(1, 4)
    given = prepared(monkeypatch, tiny_base("llama"), ids, max_new_tokens=2, streamer=streamer, pad_token_id=0)
    assert given["streamer"] is streamer, (
        "Engine.sample puts tokens into the streamer that generate passes on to _sample"
    )
    assert streamer.got == [ids.tolist()], (
        "Engine.sample puts new tokens only and calls end() itself: generate has put the prompt and nothing else"
    )


def test_the_merged_configuration_still_tells_what_is_refused():
    for asked in ({"num_beams": 3}, {"dola_layers": "low"}, {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}):
        with pytest.raises(DecodingError, match=next(iter(asked))):
            check_prepared(GenerationConfig(**asked), synced_gpus=False)
    fresh = GenerationConfig()
    check_prepared(fresh, synced_gpus=False)
    assert fresh.return_dict_in_generate in (None, False), (
        "refusals._OPTIONS reads attributes of GenerationConfig, of which a fresh one asks for nothing; Engine.sample reads "
        "return_dict_in_generate"
    )


# ------------------------------------------------------------------------------------------ processors and criteria


def test_processors_are_called_with_ids_and_float32_scores_of_the_next_token():
    base, calls = tiny_base("llama").to(torch.bfloat16), []

    def processor(ids_BT, scores_BV):
        calls.append((tuple(ids_BT.shape), scores_BV.dtype, tuple(scores_BV.shape)))
        return scores_BV

    base.generate(
        random_tokens(2, 4), max_new_tokens=2, logits_processor=LogitsProcessorList([processor]), pad_token_id=0
    )
    assert calls == [((2, length), torch.float32, (2, VOCABULARY)) for length in (4, 5)], (
        "History.scores (decoding/history.py) calls processors as transformers does: all ids so far, float32 scores"
    )


def test_criteria_need_no_scores_and_answer_per_row():
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 3

    criteria = StoppingCriteriaList([Third(), MaxLengthCriteria(10), EosTokenCriteria(torch.tensor([5]))])
    answer = criteria(torch.tensor([[1, 3], [3, 1], [1, 5]]), None)
    assert answer.tolist() == [True, False, True], (
        "History.ended calls the list of criteria with scores=None and reads one bool per row"
    )


def test_allowed_prefixes_are_asked_row_by_row_with_the_row_number():
    asked = []

    def allowed(batch_id, ids_T):
        asked.append((int(batch_id), ids_T.tolist()))
        return [1]

    processor = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
    scores = processor(torch.tensor([[4, 5], [6, 7]]), torch.zeros(2, VOCABULARY))
    assert asked == [(0, [4, 5]), (1, [6, 7])], (
        "PrefixGate (decoding/history.py) knows rows by the batch_id it is given"
    )
    assert scores.argmax(-1).tolist() == [1, 1], "PrefixGate answers for idle rows with a list of allowed tokens"


def test_guidance_still_keeps_its_state_in_this_class(monkeypatch):
    given = prepared(
        monkeypatch, tiny_base("llama"), random_tokens(1, 4), max_new_tokens=2, guidance_scale=2.0, pad_token_id=0
    )
    kinds = {type(item) for item in given["logits_processor"]}
    assert UnbatchedClassifierFreeGuidanceLogitsProcessor in kinds, (
        "Engine._respect_state recognises stateful processors by class (_STATEFUL_PROCESSORS in decoding/engine.py)"
    )


# ------------------------------------------------------------------------------------------------------------- caches


def test_a_cache_layer_must_define_what_ours_defines():
    assert RaggedLayer.__abstractmethods__ == frozenset(), (
        "RaggedLayer (decoding/cache.py) lacks a method of CacheLayerMixin"
    )
    expected = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    assert CacheLayerMixin.__abstractmethods__ == expected, (
        "RaggedLayer (decoding/cache.py) implements exactly these methods of CacheLayerMixin"
    )


def test_a_cache_of_given_layers_answers_from_them():
    cache = RaggedCache([None, 4], batch=1, capacity=20, device=torch.device("cpu"))
    cache.begin_aligned(9, 3)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 9, "masks of families that make their own come from RaggedLayer.get_seq_length"
    assert [cache.get_mask_sizes(3, layer) for layer in (0, 1)] == [(12, 0), (6, 6)], (
        "Cache.get_mask_sizes asks the layer (RaggedLayer.get_mask_sizes, decoding/cache.py)"
    )
    assert cache.is_sliding == [False, True], "Cache.is_sliding reads RaggedLayer.is_sliding"


class Witness(RaggedCache):
    """Writes down how it is called."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.calls.append((layer_idx, key_states.shape[0], key_states.shape[2], value_states.shape[2]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def filled(base, ids, *, kind=RaggedCache, room=8):
    """A cache that has read `ids` without a mask."""
    cache = kind(
        attention_windows(base.config, num_heads=0), batch=len(ids), capacity=ids.shape[1] + room, device=ids.device
    )
    cache.begin_aligned(0, ids.shape[1])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        out = base(ids, attention_mask=None, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, out.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_updates_the_cache_once_under_its_index(family):
    cache, _ = filled(tiny_base(family), random_tokens(2, 5), kind=Witness)
    assert cache.calls == [(layer, 2, 5, 5) for layer in range(3)], (
        "RaggedCache.update (decoding/cache.py) is called once per layer as update(keys [B, H, M, D], values, layer_idx)"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_without_a_mask_is_causal_or_windowed(family):
    base, ids = tiny_base(family), random_tokens(2, 17)
    _, logits = filled(base, ids)
    with torch.no_grad():
        expected = base(ids, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-4), (
        "EagerExecutor.prefill (decoding/executor.py) passes no mask and relies on the family to make its own"
    )


# ------------------------------------------------------------------------------------------------ masks and positions


def attended(base, monkeypatch):
    """The masks that the attention of every layer is given from now on."""
    seen = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(module, query, key, value, attention_mask, *args, **kwargs):
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", recording)
    assert base.config._attn_implementation == "sdpa", "BlockMasks reads config._attn_implementation"
    return seen


SDPA = [family for family in FAMILIES if family != "gemma2"]
BY_LAYER_TYPE = [family for family in SDPA if getattr(FAMILIES[family](), "layer_types", None)]


@pytest.mark.parametrize("family", SDPA)
def test_additive_masks_reach_every_layer_unchanged(family, monkeypatch):
    base = tiny_base(family)
    cache, _ = filled(base, random_tokens(2, 9))
    masks = BlockMasks(base.config, cache, width=3, dtype=torch.float32, device=torch.device("cpu"))
    cache.begin_aligned(9, 3)
    given = masks.aligned()
    seen = attended(base, monkeypatch)
    with torch.no_grad():
        base(
            random_tokens(2, 3),
            attention_mask=given,
            position_ids=torch.arange(9, 12).expand(2, 3),
            past_key_values=cache,
            use_cache=True,
        )
    kinds = getattr(base.config, "layer_types", None) or [None] * 3
    expected = [given[kind] if isinstance(given, dict) else given for kind in kinds]
    assert len(seen) == 3, "ALL_ATTENTION_FUNCTIONS is asked once per layer"
    for mask, wanted in zip(seen, expected, strict=True):
        assert mask is not None, (
            "masks.BlockMasks hands 4D masks (or one per layer type) to a forward that must not drop them"
        )
        assert torch.equal(mask, wanted), (
            "masks.BlockMasks hands 4D masks, one per layer type where config.layer_types exists, to a forward that must "
            "pass them on to attention unchanged"
        )


@pytest.mark.parametrize("family", BY_LAYER_TYPE)
def test_no_mask_per_layer_type_means_none(family, monkeypatch):
    base = tiny_base(family)
    kinds = set(base.config.layer_types)
    cache, _ = filled(base, random_tokens(1, 9))
    cache.begin_aligned(9, 1)
    seen = attended(base, monkeypatch)
    with torch.no_grad():
        base(
            random_tokens(1, 1),
            attention_mask=dict.fromkeys(kinds),
            position_ids=torch.tensor([[9]]),
            past_key_values=cache,
            use_cache=True,
        )
    assert seen == [None] * 3, (
        "BlockMasks.aligned hands {layer type: None} to a single query that sees all visible slots"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_taken_as_they_are_given(family):
    base, ids = tiny_base(family, dtype=torch.float64), random_tokens(1, 12)
    _, whole = filled(base, ids)
    cache, _ = filled(base, ids[:, :8])
    tree = Tree.from_choices([(0,), (1,)])
    masks = BlockMasks(base.config, cache, width=3, dtype=torch.float64, device=torch.device("cpu"))
    cache.begin_aligned(8, 3)
    with torch.no_grad():
        # The same token twice, as siblings: neither sees the other.
        out = base(
            ids[:, [8, 9, 9]],
            attention_mask=masks.aligned_tree(tree),
            position_ids=torch.tensor([[8, 9, 9]]),
            past_key_values=cache,
            use_cache=True,
        ).logits
    for column in (1, 2):
        assert torch.allclose(out[:, column], whole[:, 9], atol=1e-4), (
            "executor.tree_block gives siblings one position in several slots: position_ids must count, slots must not"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_called_with_its_cache_and_chooses_by_its_index(family):
    base, ids = tiny_base(family), random_tokens(1, 5)
    layers = next(getattr(base.base_model, name) for name in ("layers", "h") if hasattr(base.base_model, name))
    calls = []
    handle = layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    cache = Witness(attention_windows(base.config, num_heads=1), batch=1, capacity=8, device=ids.device)
    cache.begin_aligned(0, 5)
    with torch.no_grad():
        base(ids, past_key_values=cache, use_cache=True, position_ids=torch.arange(5)[None])
        handle.remove()
        ((args, kwargs),) = calls
        assert isinstance(args[0], torch.Tensor), (
            "model/tap.py takes the hidden states from a layer's first positional argument"
        )
        found = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        assert found == [cache], "LayerCall (heads/base.py) replays a layer with the cache among its arguments"
        for module in layers[-1].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 3
        layers[-1](*args, **kwargs)
    assert cache.calls[-1][0] == 3, (
        "heads get cache layers of their own (decoding/cache.py) through the attribute layer_idx"
    )


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_tell_windows_and_sizes_by_these_names(family):
    base, ids = tiny_base(family), random_tokens(1, 20)
    windows = attention_windows(base.config, num_heads=0)
    assert len(windows) == 3, "cache.attention_windows reads num_hidden_layers or layer_types"
    assert int(base.config.max_position_embeddings) == 256, "refusals.check_positions reads max_position_embeddings"
    cache = DynamicCache(config=base.config)
    sliding = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    assert sliding == windows, (
        "cache.attention_windows reads sliding_window and layer_types as transformers' own DynamicCache does"
    )
    with torch.no_grad():
        base(ids, past_key_values=cache, use_cache=True)
    heads = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
    assert cache.layers[0].keys.shape[1] == heads, "model/memory.py foresees the cache with num_key_value_heads"


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_parameters_are_one_dictionary_or_one_per_layer_type(family):
    rope = tiny_base(family).config.rope_parameters
    flat = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    assert all(isinstance(parameters.get("rope_type", "default"), str) for parameters in flat), (
        "refusals.check_positions and prefill.reads_at_once read rope_type from config.rope_parameters"
    )


def test_learned_positions_have_no_rotary_parameters():
    assert not getattr(tiny_base("gpt2").config, "rope_parameters", None), (
        "refusals.check_positions takes a family without rope_parameters for one with learned positions"
    )


# -------------------------------------------------------------------------------------------------------- lean layers


@pytest.mark.parametrize("family", LEAN)
def test_lean_layers_find_what_they_read(family):
    base = tiny_base(family)
    layer = base.model.layers[-1]
    for name in ("head_dim", "scaling", "o_proj", "config", "layer_idx"):
        assert hasattr(layer.self_attn, name), f"LeanLayer (decoding/lean/layer.py) reads self_attn.{name}"
    assert hasattr(layer.self_attn, "qkv_proj") or all(
        hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")
    ), "LeanLayer fuses q_proj, k_proj and v_proj, or reads qkv_proj"
    assert hasattr(layer.mlp, "gate_up_proj") or all(hasattr(layer.mlp, name) for name in ("gate_proj", "up_proj")), (
        "LeanLayer fuses gate_proj and up_proj, or reads gate_up_proj"
    )
    assert hasattr(layer.mlp, "act_fn") or hasattr(layer.mlp, "activation_fn"), "LeanLayer reads the mlp's act_fn"
    assert hasattr(layer, "input_layernorm") or hasattr(layer, "post_feedforward_layernorm"), (
        "LeanLayer tells pre-norm from post-norm layers by input_layernorm"
    )


@pytest.mark.parametrize("family", LEAN)
def test_rotary_tables_repeat_their_first_half(family):
    base = tiny_base(family)
    cos, sin = base.model.rotary_emb(torch.zeros(1, 1), torch.arange(7)[None])
    assert cos.shape[:2] == sin.shape[:2] == (1, 7), (
        "LeanModel._rotary calls rotary_emb(x, position_ids) for its tables"
    )
    for table in (cos, sin):
        left, right = table.chunk(2, dim=-1)
        assert torch.equal(left, right), (
            "functional/rotary.py rotates halves: tables of LeanModel hold each angle twice"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LEAN)
def test_norms_round_as_ours_do(family, dtype):
    norm = tiny_base(family).to(dtype).model.norm
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        theirs = norm(x)
    tolerance = 1e-6 if dtype == torch.float32 else 0
    assert torch.allclose(RMSNorm(norm)(x), theirs, atol=tolerance, rtol=tolerance), (
        "RMSNorm (decoding/lean/layer.py) reads variance_epsilon and rounds before or after the weight as the family does"
    )
