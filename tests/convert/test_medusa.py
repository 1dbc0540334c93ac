"""Medusa heads of other people's trainers and engines come in exactly, and ours go out so that theirs read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import medusa_layouts
from head_cases import head_model
from headway.convert.convert import convert
from headway.errors import CheckpointError, ConfigError, IncompatibleModelError
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import VOCABULARY, random_tokens, tiny_base

TOKENS = random_tokens(2, 12)


def base_in(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32):
    torch.manual_seed(5)
    base = tiny_base(family).to(dtype).eval()
    base.save_pretrained(folder)
    return base


def all_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        model = MultiTokenLM.from_pretrained(folder, dtype=torch.float32)
        return model(TOKENS, return_future_logits=True).future_logits


@pytest.mark.parametrize("safetensors", [False, True], ids=["pt", "safetensors"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_fasterdecoding_heads_say_what_their_own_modules_say(blocks, own, safetensors, tmp_path):
    base = base_in(tmp_path / "base", "llama-gqa-tied")
    heads = medusa_layouts.trained_heads(base, 3, blocks=blocks, own=own)
    medusa_layouts.write_medusa(tmp_path / "m", heads, safetensors=safetensors)
    report = convert(
        tmp_path / "m",
        tmp_path / "hw",
        source_format="medusa",
        target_format="headway",
        base=tmp_path / "base",
        verify=True,
    )
    expected = medusa_layouts.forward(base, heads, TOKENS)
    found = all_logits(tmp_path / "hw")
    assert found.shape == expected.shape == (2, 12, 4, VOCABULARY)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected[:, :, 1] - expected[:, :, 2]).abs().max() > 0.1
    assert report.num_future_tokens == 4
    assert report.verification.unchanged == ()


@pytest.mark.parametrize("kind", ["own", "shared", "one-for-all", "no-bias"])
def test_engine_heads_say_what_the_engine_says(kind, tmp_path):
    base = base_in(tmp_path / "base")
    heads = medusa_layouts.trained_heads(base, 2, blocks=2, own=kind in ("own", "no-bias"))
    if kind == "no-bias":
        for head in heads:
            for block in (0, 1):
                torch.nn.init.zeros_(head[block].linear.bias)
    one = {"shared": base.lm_head.weight, "one-for-all": base.lm_head.weight.flip(0) * 1.5}.get(kind)
    changes = {"medusa_fc_bias": False} if kind == "no-bias" else {}
    medusa_layouts.write_engine(tmp_path / "m", heads, base, one_matrix=one, **changes)
    options = {"source_format": "medusa-engine", "base": tmp_path / "base", "verify": True}
    report = convert(tmp_path / "m", tmp_path / "hw", target_format="headway", **options)
    expected = medusa_layouts.forward(base, heads, TOKENS, one_matrix=one)
    torch.testing.assert_close(all_logits(tmp_path / "hw"), expected, rtol=0, atol=1e-5)
    config = MultiTokenLM.from_pretrained(tmp_path / "hw").mtp_config
    assert (config.own_unembedding, config.blocks_per_head) == (False if kind == "shared" else None, 2)
    words = {"one-for-all": "a copy of it", "no-bias": "it is zero"}.get(kind)
    assert words is None or any(words in note for note in report.notes)
    back = {"source_format": "headway", "target_format": "medusa-engine", "verify": True}
    convert(tmp_path / "hw", tmp_path / "again", **back)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    if kind in ("own", "shared"):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        written = json.loads((tmp_path / "again" / "config.json").read_text())
        said = json.loads((tmp_path / "m" / "config.json").read_text())
        assert said.items() <= written.items()


@pytest.mark.parametrize("layout", ["medusa", "medusa-engine"])
@pytest.mark.parametrize(
    "options", [{}, {"blocks_per_head": 2, "own_unembedding": False, "offset_weights": (1.0, 0.5, 0.25)}], ids=str
)
def test_there_and_back_is_bit_exact_and_keeps_the_loss_weights(options, layout, tmp_path):
    model = head_model("medusa", num_future_tokens=3) if not options else None
    if model is None:
        torch.manual_seed(2)
        model = MultiTokenLM(
            tiny_base("llama"), MultiTokenConfig(num_future_tokens=3, heads="medusa", head_init="fresh", **options)
        )
        with torch.no_grad():
            for parameter in model.heads.parameters():
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "a")
    there = convert(tmp_path / "a", tmp_path / "m", source_format="headway", target_format=layout, verify=True)
    assert there.num_base_tensors == 0
    assert there.num_head_tensors == len(model.heads.state_dict())
    assert len(there.verification.max_abs_difference) == 3
    convert(
        tmp_path / "m",
        tmp_path / "b",
        source_format=layout,
        target_format="headway",
        base=tmp_path / "a",
        verify=True,
    )
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert again.mtp_config.offset_weights == model.mtp_config.offset_weights
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_other_code_loads_what_is_exported(tmp_path):
    model = head_model("medusa", num_future_tokens=4)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "m", source_format="headway", target_format="medusa")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == {"base_model_name_or_path": "a", "medusa_num_heads": 3, "medusa_num_layers": 1}
    heads = medusa_layouts.trained_heads(model.base, 3, seed=9)
    heads.load_state_dict(torch.load(tmp_path / "m" / "medusa_lm_head.pt", weights_only=True), strict=True)
    with torch.no_grad():
        expected = model(TOKENS, return_future_logits=True).future_logits
    torch.testing.assert_close(medusa_layouts.forward(model.base, heads, TOKENS), expected, rtol=0, atol=1e-5)


def test_the_base_comes_by_folder_by_name_or_as_the_heads_name_it(tmp_path, monkeypatch):
    base = base_in(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("of the base")
    heads = medusa_layouts.trained_heads(base, 2)
    medusa_layouts.write_medusa(tmp_path / "m", heads, base="somebody/tiny-base")
    options = {"source_format": "medusa", "target_format": "headway"}
    with pytest.raises(CheckpointError, match=r"somebody/tiny-base.*--base"):
        convert(tmp_path / "m", tmp_path / "no", **options)
    # The hub's cache as huggingface_hub lays it out.
    cache = tmp_path / "hub" / "models--somebody--tiny-base"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "base", cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    named = convert(tmp_path / "m", tmp_path / "named", **options)
    assert any("somebody/tiny-base, as the heads name it" in note for note in named.notes)
    given = convert(tmp_path / "m", tmp_path / "given", base="somebody/tiny-base", **options)
    folder = convert(tmp_path / "m", tmp_path / "folder", base=tmp_path / "base", **options)
    for report, where in ((named, "named"), (given, "given"), (folder, "folder")):
        assert report.base_name == "somebody/tiny-base"
        assert report.companions == ("LICENSE",)
        assert (tmp_path / where / "LICENSE").read_text() == "of the base"
        assert torch.equal(all_logits(tmp_path / where), all_logits(tmp_path / "folder"))


def test_released_heads_that_are_more_than_they_say_are_all_read(tmp_path):
    base = base_in(tmp_path / "base")
    medusa_layouts.write_medusa(tmp_path / "m", medusa_layouts.trained_heads(base, 5), said=2, prefix="medusa_head.")
    report = convert(
        tmp_path / "m", tmp_path / "b", source_format="medusa", target_format="headway", base=tmp_path / "base"
    )
    assert report.num_future_tokens == 6
    assert any("says medusa_num_heads=2, the weights hold 5" in note for note in report.notes)


def broken(folder: Path, change) -> None:
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "medusa_lm_head.pt")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.update({"0.0.linear.extra": torch.zeros(1)}), "0.0.linear.extra"),
        (lambda state: state.pop("1.0.linear.bias"), "head 1 block 0 bias"),
        (lambda state: state.pop("1.1.weight"), "all heads need one"),
        (lambda state: state.update({"0.1.weight": torch.zeros(VOCABULARY - 1, 32)}), "unembeddings.0.weight is"),
        (lambda state: state.clear(), "no Medusa head"),
    ],
)
def test_faults_are_named(change, match, tmp_path):
    base = base_in(tmp_path / "base")
    medusa_layouts.write_medusa(tmp_path / "m", medusa_layouts.trained_heads(base, 2))
    broken(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "m", tmp_path / "b", source_format="medusa", target_format="headway", base=tmp_path / "base")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "extra", "match"),
    [
        ({"truncated_vocab_size": 20}, {}, "predict 20 of"),
        ({"logit_scale": 0.5}, {}, "logit_scale"),
        ({}, {"token_map": torch.arange(20)}, "token_map"),
    ],
)
def test_what_headway_cannot_hold_is_refused(changes, extra, match, tmp_path):
    base = base_in(tmp_path / "base")
    medusa_layouts.write_engine(tmp_path / "m", medusa_layouts.trained_heads(base, 2), base, **changes)
    if extra:
        file = tmp_path / "m" / "model.safetensors"
        save_file(load_file(file) | extra, file)
    with pytest.raises(IncompatibleModelError, match=match):
        convert(
            tmp_path / "m",
            tmp_path / "b",
            source_format="medusa-engine",
            target_format="headway",
            base=tmp_path / "base",
        )


@pytest.mark.parametrize("layout", ["medusa", "medusa-engine"])
@pytest.mark.parametrize("name", ["transformer", "hydra", "medusa-2-blocks-shared-markov", "linear"])
def test_other_heads_are_refused_by_what_differs(name, layout, tmp_path):
    head_model(name).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleModelError, match=r"(heads=|markov_rank=).*--to headway"):
        convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=layout)
    assert not (tmp_path / "b").exists()


def test_heads_are_held_to_the_base_that_they_were_written_for(tmp_path):
    head_model("medusa").save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "m", source_format="headway", target_format="medusa")
    other = tiny_base("llama")
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    options = {"source_format": "medusa", "target_format": "headway"}
    with pytest.raises(CheckpointError, match="another base"):
        convert(tmp_path / "m", tmp_path / "b", base=tmp_path / "other", **options)
    with pytest.raises(CheckpointError, match="--base"):
        convert(tmp_path / "m", tmp_path / "b", **options)
    with pytest.raises(ConfigError, match="--base is for heads alone"):
        convert(tmp_path / "other", tmp_path / "b", source_format="hf", target_format="hf", base=tmp_path / "other")


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    base = base_in(tmp_path / "base")
    medusa_layouts.write_medusa(tmp_path / "m", medusa_layouts.trained_heads(base, 1))
    torch.save({"0.0.linear.weight": base}, tmp_path / "m" / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        convert(tmp_path / "m", tmp_path / "b", source_format="medusa", target_format="headway", base=tmp_path / "base")


@pytest.mark.parametrize("layout", ["medusa", "medusa-engine"])
def test_dtype_rounds_the_heads_and_dropping_heads_keeps_the_rest(layout, tmp_path):
    model = head_model("medusa")
    model.save_pretrained(tmp_path / "a")
    report = convert(
        tmp_path / "a",
        tmp_path / "m",
        source_format="headway",
        target_format=layout,
        dtype=torch.bfloat16,
        num_future_tokens=2,
        verify=True,
    )
    assert (report.dtype, report.num_future_tokens) == ("bfloat16", 2)
    convert(
        tmp_path / "m", tmp_path / "b", source_format=layout, target_format="headway", base=tmp_path / "a", verify=True
    )
    again = MultiTokenLM.from_pretrained(tmp_path / "b").heads.state_dict()
    assert all(torch.equal(tensor, model.heads.state_dict()[name].bfloat16()) for name, tensor in again.items())
    assert len(again) == 3
