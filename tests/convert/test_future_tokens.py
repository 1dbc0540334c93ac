"""Changing n takes heads away or adds them, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from headway.convert.convert import convert
from headway.errors import ConfigError
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import FAMILIES, random_tokens, tiny_base, tiny_model

TOKENS = random_tokens(2, 12)
HEADWAY = {"source_format": "headway", "target_format": "headway"}


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_dropping_heads_leaves_the_others_as_they_were(kept, tmp_path):
    model = tiny_model(num_future_tokens=4, offset_weights=(1.0, 0.5, 0.25, 0.125))
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", num_future_tokens=kept, verify=True, **HEADWAY)
    assert (report.source_num_future_tokens, report.num_future_tokens) == (4, kept)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert again.num_future_tokens == kept
    assert again.mtp_config.offset_weights == (1.0, 0.5, 0.25, 0.125)[:kept]
    assert torch.equal(all_logits(again), all_logits(model)[:, :, :kept])
    assert any("dropped" in note for note in report.notes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_init", ["copy", "fresh"])
def test_adding_heads_to_a_plain_model(head_init, family, tmp_path):
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "a")
    report = convert(
        tmp_path / "a",
        tmp_path / "b",
        source_format="hf",
        target_format="headway",
        num_future_tokens=3,
        head_init=head_init,
        verify=True,
    )
    model = MultiTokenLM.from_pretrained(tmp_path / "b")
    logits = all_logits(model)
    with torch.no_grad():
        assert torch.equal(logits[:, :, 0], base(TOKENS, use_cache=False).logits)
    assert model.mtp_config.head_init == head_init
    names = set(model.heads.state_dict())
    if head_init == "copy":
        assert set(report.verification.unchanged) == names
        assert report.verification.random == ()
        torch.testing.assert_close(logits[:, :, 1], logits[:, :, 0], rtol=0, atol=1e-5)
        assert report.verification.max_abs_difference[1] is not None
    else:
        assert set(report.verification.random) == names
        assert report.verification.max_abs_difference[1:] == (None, None)
        matrices = [n for n in names if model.heads.state_dict()[n].ndim == 2]
        assert not set(matrices) & set(report.verification.unchanged)
        first = model.heads[0].state_dict()
        assert any(not torch.equal(first[n], value) for n, value in model.heads[1].state_dict().items())


def test_fresh_heads_have_the_familys_spread_and_follow_their_seed(tmp_path):
    tiny_base("llama", hidden_size=64).save_pretrained(tmp_path / "a")
    options = {"source_format": "hf", "target_format": "headway", "num_future_tokens": 3, "head_init": "fresh"}
    state = torch.random.get_rng_state()
    heads = []
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        convert(tmp_path / "a", tmp_path / name, seed=seed, **options)
        heads.append(load_file(tmp_path / name / "mtp" / "heads.safetensors"))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "0.mlp.up_proj.weight"
    assert all(torch.equal(tensor, heads[1][key]) for key, tensor in heads[0].items())
    assert not torch.equal(heads[0][name], heads[2][name])
    assert float(heads[0][name].std()) == pytest.approx(0.2, rel=0.1)  # initializer_range of the tiny models
    assert torch.equal(heads[0]["0.input_layernorm.weight"], torch.ones(64))


def test_adding_heads_to_heads_keeps_the_old_ones(tmp_path):
    model = tiny_model(num_future_tokens=2, offset_weights=(1.0, 0.5))
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", num_future_tokens=4, head_init="fresh", verify=True, **HEADWAY)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert torch.equal(all_logits(again)[:, :, :2], all_logits(model))
    assert again.mtp_config.offset_weights == (1.0, 0.5, 1.0, 1.0)
    assert {name.partition(".")[0] for name in report.verification.random} == {"1", "2"}
    assert len(report.verification.max_abs_difference) == 4


def test_the_same_n_changes_nothing_and_one_is_a_folder_without_heads(tmp_path):
    model = tiny_model(num_future_tokens=3)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", num_future_tokens=3, **HEADWAY)
    assert report.notes == ()
    report = convert(tmp_path / "a", tmp_path / "c", num_future_tokens=1, **HEADWAY)
    assert report.num_head_tensors == 0
    assert MultiTokenLM.from_pretrained(tmp_path / "c").num_future_tokens == 1


def test_n_changes_on_the_way_to_another_layout(tmp_path):
    model = tiny_model(num_future_tokens=4)
    model.save_pretrained(tmp_path / "a")
    convert(
        tmp_path / "a",
        tmp_path / "b",
        source_format="headway",
        target_format="facebook",
        num_future_tokens=2,
        verify=True,
    )
    report = convert(tmp_path / "b", tmp_path / "c", source_format="facebook", target_format="headway")
    assert report.num_future_tokens == 2
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "c")), all_logits(model)[:, :, :2])


@pytest.mark.parametrize(
    ("source_format", "target_format", "future", "match"),
    [
        ("hf", "headway", None, "--num-future-tokens 4"),
        ("hf", "hf", 2, "holds no heads"),
        ("hf", "headway", 0, ">= 1"),
    ],
)
def test_a_choice_that_is_missing_or_impossible_is_named(source_format, target_format, future, match, tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=match):
        convert(
            tmp_path / "a",
            tmp_path / "b",
            source_format=source_format,
            target_format=target_format,
            num_future_tokens=future,
        )
    assert not (tmp_path / "b").exists()
