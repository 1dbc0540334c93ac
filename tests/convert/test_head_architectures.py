"""Heads of every architecture convert: whole, fewer, or into the plain model that they make; never silently lost."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from head_cases import ARCHITECTURES, CHANGES_BASE, head_model
from headway.convert.convert import convert
from headway.errors import ConfigError, IncompatibleModelError
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.stack import plain_stack
from tiny_models import random_tokens, tiny_base

TOKENS = random_tokens(2, 9)
HEADWAY = {"source_format": "headway", "target_format": "headway"}


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_rewritten_bit_for_bit(name, tmp_path):
    model = head_model(name)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert again.mtp_config == model.mtp_config
    assert same(all_logits(again), all_logits(model))
    assert report.verification.max_abs_difference == (0.0,) * 4
    assert report.verification.random == report.verification.unchanged == ()
    assert sorted(str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*")) == sorted(
        str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*")
    )


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("name", sorted(CHANGES_BASE))
def test_heads_on_the_next_token_path_become_layers_of_the_plain_export(name, family, tmp_path):
    model = head_model(name, family, num_future_tokens=3)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf", verify=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    expected = plain_stack(model)
    assert plain.config.num_hidden_layers == 5
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, expected(TOKENS).logits)
        torch.testing.assert_close(plain(TOKENS).logits, all_logits(model)[:, :, 0], rtol=0, atol=1e-5)
    assert any("became layers 2 to 3" in note for note in report.notes)
    assert report.num_base_tensors == len(load_file(tmp_path / "b" / "model.safetensors"))


def test_two_layers_per_head_are_stacked_in_their_order(tmp_path):
    options = {"wiring": "anticausal", "allow_base_change": True, "layers_per_head": 2, "head_init": "fresh"}
    torch.manual_seed(1)
    model = MultiTokenLM(tiny_base("llama"), MultiTokenConfig(num_future_tokens=3, **options))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf", verify=True)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "b")(TOKENS).logits
        assert torch.equal(found, plain_stack(model)(TOKENS).logits)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in CHANGES_BASE])
def test_the_plain_export_of_other_heads_is_the_base(name, tmp_path):
    model = head_model(name)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="hf", verify=True)
    assert not (tmp_path / "b" / "mtp").exists()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "b")(TOKENS).logits
        assert torch.equal(found, model.base(TOKENS).logits)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in CHANGES_BASE])
@pytest.mark.parametrize("kept", [1, 3])
def test_dropping_heads_leaves_the_others_as_they_were(kept, name, tmp_path):
    model = head_model(name)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", num_future_tokens=kept, verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    expected = all_logits(model)[:, :, :kept]
    # A head that reads drafted tokens is undefined at the same places, however many heads follow it.
    assert same(all_logits(again), expected)
    assert any(
        "dropped" in note for note in convert(tmp_path / "a", tmp_path / "c", num_future_tokens=kept, **HEADWAY).notes
    )


@pytest.mark.parametrize("head_init", ["copy", "fresh"])
@pytest.mark.parametrize(
    "name", ["transformer-2-layers", "transformer-tap", "transformer-markov", "causal", "causal-2-layers-markov"]
)
def test_transformer_heads_of_every_kind_can_be_added_to(name, head_init, tmp_path):
    model = head_model(name, num_future_tokens=2)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", num_future_tokens=4, head_init=head_init, verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert same(all_logits(again)[:, :, :2], all_logits(model))
    layer = model.family.last_layer.state_dict()
    added = {key: value for key, value in again.heads.state_dict().items() if key[0] in "12"}
    copies = {key for key, value in added.items() if torch.equal(value, layer[key.lstrip("0123456789.")])}
    if head_init == "copy":
        assert copies == added.keys() == set(report.verification.unchanged)
    else:
        assert added.keys() == set(report.verification.random)
        assert not any(key.endswith("proj.weight") for key in copies)
        assert not torch.equal(added[next(iter(added))], added[next(iter(added)).replace("1", "2", 1)]) or (
            next(iter(added)).endswith("norm.weight")
        )


def test_one_shared_module_serves_any_number_of_offsets(tmp_path):
    model = head_model("sequential-shared", num_future_tokens=3)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", num_future_tokens=5, verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert again.num_future_tokens == 5
    assert same(all_logits(again)[:, :, :3], all_logits(model))
    assert any("shared module serves offsets 4 to 5" in note for note in report.notes)


DRAWN = ("transformer-markov", "linear-tap-markov", "medusa", "hydra", "sequential")


@pytest.mark.parametrize(
    ("name", "head_init"),
    [(name, "copy") for name in ARCHITECTURES if name not in CHANGES_BASE] + [(name, "fresh") for name in DRAWN],
)
def test_a_plain_model_gets_heads_of_any_architecture_as_attach_heads_starts_them(name, head_init, tmp_path):
    tiny_base("llama-gqa-tied").save_pretrained(tmp_path / "a")
    options = dict(ARCHITECTURES[name])
    heads = options.pop("heads", "transformer")
    report = convert(
        tmp_path / "a",
        tmp_path / "b",
        source_format="hf",
        target_format="headway",
        num_future_tokens=3,
        heads=heads,
        head_options=options,
        head_init=head_init,
        verify=True,
    )
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    config = MultiTokenConfig(num_future_tokens=3, heads=heads, head_init=head_init, **options)
    assert again.mtp_config == config
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.manual_seed(11)
    expected = [MultiTokenLM(base, config).heads.state_dict() for _ in range(2)]
    found = again.heads.state_dict()
    assert found.keys() == expected[0].keys()
    drawn = {key for key in found if not torch.equal(expected[0][key], expected[1][key])}
    for key in found.keys() - drawn:
        assert torch.equal(found[key], expected[0][key])
    for key in drawn:
        # Of the same distribution: drawn for good, and as widely.
        assert not torch.equal(found[key], expected[0][key])
        torch.testing.assert_close(found[key].std(), expected[0][key].std(), rtol=0.4, atol=0)
    assert drawn <= set(report.verification.random)
    assert (head_init == "fresh") <= bool(drawn)
    # Every head begins as the next-token head, where its kind allows it.
    if head_init == "copy" and heads in ("linear", "medusa", "replicated_unembedding") and not options:
        assert max(report.verification.max_abs_difference) <= report.verification.limit
        assert len(report.verification.max_abs_difference) == 3


@pytest.mark.parametrize(
    "name", ["medusa", "hydra", "sequential", "linear", "replicated", "medusa-2-blocks-shared-markov"]
)
def test_heads_can_be_added_to_heads_of_any_architecture(name, tmp_path):
    model = head_model(name, num_future_tokens=2)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", num_future_tokens=4, verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert again.num_future_tokens == 4
    assert same(all_logits(again)[:, :, :2], all_logits(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": "medusa"}, "num_future_tokens >= 2"),
        ({"heads": "medusa", "num_future_tokens": 1}, "num_future_tokens >= 2"),
        ({"heads": "medusa", "num_future_tokens": 3, "target_format": "hf"}, "a format that holds heads"),
        ({"heads": "linear", "head_options": {"wiring": "causal"}, "num_future_tokens": 3}, "only transformer"),
        ({"head_options": {"blocks": 2}, "num_future_tokens": 3}, "unknown field 'blocks'"),
        (
            {"head_options": {"wiring": "anticausal", "allow_base_change": True}, "num_future_tokens": 3},
            "train it from scratch",
        ),
    ],
)
def test_heads_that_cannot_be_added_are_refused(options, match, tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=match):
        convert(tmp_path / "a", tmp_path / "b", **({"source_format": "hf", "target_format": "headway"} | options))
    assert not (tmp_path / "b").exists()


def test_a_model_with_heads_gets_no_second_kind(tmp_path):
    head_model("medusa").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="already"):
        convert(tmp_path / "a", tmp_path / "b", heads="linear", num_future_tokens=3, **HEADWAY)


@pytest.mark.parametrize(("heads", "target"), [("transformer", "facebook"), ("medusa", "medusa"), ("sequential", "hf")])
@pytest.mark.parametrize("auxiliary", ["top", "mutor"])
def test_what_training_alone_uses_stays_behind_by_name(auxiliary, heads, target, tmp_path):
    config = MultiTokenConfig(num_future_tokens=3, heads=heads, auxiliary=auxiliary, auxiliary_weight=0.5)
    model = MultiTokenLM(tiny_base("llama"), config)
    model.save_pretrained(tmp_path / "a")
    own = [name for name in model.heads.state_dict() if name.startswith("auxiliary.")]
    kept = convert(tmp_path / "a", tmp_path / "same", verify=True, **HEADWAY)
    assert (len(own) > 0, kept.left_out) == (True, ())
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target, verify=True)
    assert [line.partition(":")[0] for line in report.left_out] == own


@pytest.mark.parametrize(
    ("name", "future", "match"),
    [
        ("anticausal", 2, "another model"),
        ("anticausal", 5, "another model"),
    ],
)
def test_heads_on_the_next_token_path_are_neither_added_nor_taken_away(name, future, match, tmp_path):
    head_model(name).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=match):
        convert(tmp_path / "a", tmp_path / "b", num_future_tokens=future, **HEADWAY)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "transformer"])
def test_facebook_layout_refuses_every_other_architecture_by_what_differs(name, tmp_path):
    model = head_model(name)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleModelError, match="--to headway") as caught:
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format="facebook")
    assert any(f"{option}={value!r}" in str(caught.value) for option, value in ARCHITECTURES[name].items())


def test_medusa_heads_as_they_start_are_named_as_copies(tmp_path):
    torch.manual_seed(0)
    model = MultiTokenLM(tiny_base("llama"), MultiTokenConfig(num_future_tokens=3, heads="medusa"))
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", verify=True, **HEADWAY)
    blocks = tuple(f"{head}.0.inner.weight" for head in (0, 1))
    assert report.verification.unchanged == (*blocks, "unembeddings.0.weight", "unembeddings.1.weight")


def test_a_folder_that_only_headway_loads_replaces_and_is_replaced_as_a_whole(tmp_path):
    head_model("anticausal").save_pretrained(tmp_path / "a")
    head_model("transformer").save_pretrained(tmp_path / "t")
    convert(tmp_path / "a", tmp_path / "t", overwrite=True, verify=True, **HEADWAY)
    assert not list((tmp_path / "t").glob("*.safetensors"))
    assert json.loads((tmp_path / "t" / "config.json").read_text())["model_type"] == "headway_multi_token"
    head_model("medusa").save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "t", overwrite=True, verify=True, **HEADWAY)
    assert sorted(str(path.relative_to(tmp_path / "t")) for path in (tmp_path / "t").rglob("*")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "mtp",
        "mtp/config.json",
        "mtp/heads.safetensors",
    ]
