"""Sequential modules: released layouts come in exactly, and plain transformers drafts with what goes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator

import released_modules
from head_cases import head_model
from headway.convert.convert import convert
from headway.errors import CheckpointError, IncompatibleModelError
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens, tiny_base

TOKENS = random_tokens(2, 14)
OUT = {"source_format": "headway", "target_format": "transformers-mtp"}
IN = {"source_format": "transformers-mtp", "target_format": "headway"}


@torch.no_grad()
def all_logits(model: MultiTokenLM, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens, return_future_logits=True, use_cache=False).future_logits


@pytest.mark.parametrize("layout", released_modules.CONFIGS)
def test_released_layouts_say_what_an_independent_forward_says(layout, tmp_path):
    state = released_modules.write_folder(tmp_path / "m", layout)
    (tmp_path / "m" / "LICENSE").write_text("x")
    report = convert(tmp_path / "m", tmp_path / "hw", verify=True, **IN)
    expected = released_modules.forward(state, layout, TOKENS)
    found = all_logits(MultiTokenLM.from_pretrained(tmp_path / "hw"))
    assert found.shape == expected.shape == (2, 14, released_modules.num_modules(layout) + 1, 40)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, equal_nan=True)
    assert expected.nan_to_num().abs().max() > 1
    assert report.companions == ("LICENSE",)
    repeated = [name for name in report.left_out if "which the modules share" in name]
    assert len(repeated) == (4 if layout == "deepseek" else 0)
    config = json.loads((tmp_path / "hw" / "config.json").read_text())
    assert not [name for name in config if "mtp" in name or "nextn" in name or name == "auto_map"]
    assert config["model_type"] == {"mimo": "qwen2", "deepseek": "llama", "qwen": "qwen3"}[layout]


@pytest.mark.parametrize("layout", released_modules.CONFIGS)
def test_the_wrong_order_of_the_concatenation_would_be_seen(layout, tmp_path):
    state = released_modules.write_folder(tmp_path / "m", layout)
    *_, projection, _ = released_modules.module_names(layout, 0)
    expected = released_modules.forward(state, layout, TOKENS)[:, :-2, 1]
    first, second = state[projection].chunk(2, dim=1)
    swapped = state | {projection: torch.cat((second, first), dim=1)}
    assert (released_modules.forward(swapped, layout, TOKENS)[:, :-2, 1] - expected).abs().max() > 0.1
    convert(tmp_path / "m", tmp_path / "hw", **IN)
    held = load_file(tmp_path / "hw" / "mtp" / "heads.safetensors")["0.projection.weight"]
    assert torch.equal(held, state[projection] if layout == "mimo" else swapped[projection])


def test_the_plain_model_of_a_released_checkpoint(tmp_path):
    state = released_modules.write_folder(tmp_path / "m", "mimo")
    convert(tmp_path / "m", tmp_path / "hf", source_format="transformers-mtp", target_format="hf", verify=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(plain).__name__ == "Qwen2ForCausalLM"
    expected = released_modules.forward(state, "mimo", TOKENS)[:, :, 0]
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=0, atol=1e-5)
    released_modules.write_folder(tmp_path / "d", "deepseek")
    with pytest.raises(CheckpointError, match="--from transformers-mtp"):
        convert(tmp_path / "d", tmp_path / "no", source_format="hf", target_format="hf")


CASES = [
    ("sequential-own-norm", "llama-gqa-tied", 2),
    ("sequential-own-norm", "llama", 4),
    ("sequential-own-norm", "qwen2", 3),
    ("sequential-own-norm", "qwen3", 4),
    ("sequential", "llama-rope-scaled", 2),
    ("shared", "llama", 3),
]


def sequential_model(name: str, family: str, future: int) -> MultiTokenLM:
    if name != "shared":
        return head_model(name, family, num_future_tokens=future)
    torch.manual_seed(4)
    options = {"heads": "sequential", "share_modules": True, "own_output_norm": True, "head_init": "fresh"}
    return MultiTokenLM(tiny_base(family), MultiTokenConfig(num_future_tokens=future, **options))


@pytest.mark.parametrize(("name", "family", "future"), CASES)
def test_plain_transformers_drafts_the_same_tokens(name, family, future, tmp_path, monkeypatch):
    model = sequential_model(name, family, future)
    model.save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "t", verify=True, **OUT)
    assert len(report.verification.max_abs_difference) == future
    drafts: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = MTPCandidateGenerator.get_candidates

    def watched(self, input_ids, *args, **kwargs):
        candidates, logits = original(self, input_ids, *args, **kwargs)
        if candidates.shape[1] > input_ids.shape[1]:
            drafts.append((input_ids.clone(), candidates[0, input_ids.shape[1] :].clone()))
        return candidates, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", watched)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    prompt = TOKENS[:1, :6]
    settings = {"max_new_tokens": 16, "do_sample": False}
    drafted = plain.generate(prompt, use_mtp=True, **settings)
    assert torch.equal(drafted, plain.generate(prompt, **settings))
    assert torch.equal(drafted, model.base.generate(prompt, **settings))
    assert len(drafts) >= 5
    for known, draft in drafts:
        assert len(draft) == future - 1
        text = known
        for offset, token in enumerate(draft, start=2):
            # The last known token is not processed yet: the draft starts at the position before it.
            expected = all_logits(model, text)[0, known.shape[1] - 2, offset - 1].argmax()
            assert token == expected
            text = torch.cat((text, token[None, None]), dim=1)


@pytest.mark.parametrize(("name", "family", "future"), CASES)
def test_there_and_back_is_bit_exact(name, family, future, tmp_path):
    model = sequential_model(name, family, future)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "t", **OUT)
    convert(tmp_path / "t", tmp_path / "b", verify=True, **IN)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    assert type(again.base) is type(model.base)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(all_logits(again), all_logits(model), rtol=0, atol=0, equal_nan=True)
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in "ab")
    assert before == after


def test_weights_without_the_sidecar_are_still_a_model(tmp_path):
    model = head_model("sequential-own-norm", "qwen3", num_future_tokens=3)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "t", **OUT)
    (tmp_path / "t" / "headway.json").unlink()
    convert(tmp_path / "t", tmp_path / "b", verify=True, **IN)
    again = MultiTokenLM.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(all_logits(again), all_logits(model), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "family", "future", "match"),
    [
        ("transformer", "llama", 3, "heads='transformer'"),
        ("medusa", "llama", 3, "heads='medusa'"),
        ("sequential", "llama", 3, "own_output_norm=False"),
        ("sequential-own-norm", "gemma3_text", 2, "no other family's do"),
        ("sequential-own-norm", "qwen3-sliding", 2, "sliding windows"),
        ("sequential-own-norm", "mistral-sliding", 2, "sliding windows"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_with_the_nearest_alternative(name, family, future, match, tmp_path):
    head_model(name, family, num_future_tokens=future).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleModelError, match=rf"{match}.*--to headway"):
        convert(tmp_path / "a", tmp_path / "t", **OUT)
    assert not (tmp_path / "t").exists()


def changed(folder: Path, layout: str, change) -> None:
    state = released_modules.random_state(layout)
    change(state)
    released_modules.write_folder(folder, layout, state=state)


@pytest.mark.parametrize(
    ("layout", "change", "error", "match"),
    [
        ("deepseek", lambda s: s.update({"model.mystery.weight": torch.zeros(2)}), CheckpointError, "mystery"),
        (
            "deepseek",
            lambda s: s.update({"model.layers.4.mystery": torch.zeros(2)}),
            CheckpointError,
            r"1\.layer\.mystery",
        ),
        ("deepseek", lambda s: s.pop("model.layers.3.hnorm.weight"), CheckpointError, r"0\.hidden_norm\.weight"),
        (
            "deepseek",
            lambda s: [s.pop(name) for name in list(s) if name.startswith("model.layers.3.")],
            CheckpointError,
            "without a gap",
        ),
        (
            "deepseek",
            lambda s: s["model.layers.3.shared_head.head.weight"].add_(1),
            IncompatibleModelError,
            "share embedding and output",
        ),
        (
            "qwen",
            lambda s: s.update(
                {n.replace(".0.", ".1."): t.clone() for n, t in s.items() if n.startswith("mtp.layers")}
            ),
            IncompatibleModelError,
            "one projection for 2 layers",
        ),
        ("qwen", lambda s: [s.pop(n) for n in list(s) if n.startswith("mtp.")], CheckpointError, "holds none"),
    ],
)
def test_faults_are_named(layout, change, error, match, tmp_path):
    changed(tmp_path / "m", layout, change)
    with pytest.raises(error, match=match):
        convert(tmp_path / "m", tmp_path / "b", **IN)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen3_5_text"}, "qwen3_5_text"),
        ({"model_type": "mimo_v2_flash"}, "mixture-of-experts"),
        ({"model_type": "never_heard_of"}, "never_heard_of"),
    ],
)
def test_a_base_that_heads_cannot_follow_is_refused(changes, match, tmp_path):
    released_modules.write_folder(tmp_path / "m", "deepseek", **changes)
    with pytest.raises(IncompatibleModelError, match=match):
        convert(tmp_path / "m", tmp_path / "b", **IN)


def test_a_count_that_is_wrong_is_told_and_a_sidecar_that_is_not_its_own_refused(tmp_path):
    released_modules.write_folder(tmp_path / "m", "deepseek", num_nextn_predict_layers=1)
    report = convert(tmp_path / "m", tmp_path / "b", **IN)
    assert any("says 1 modules, the weights hold 2" in note for note in report.notes)
    model = head_model("sequential-own-norm", num_future_tokens=3)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "t", **OUT)
    path = tmp_path / "t" / "headway.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"multi_token": record["multi_token"] | {"num_future_tokens": 4}}))
    with pytest.raises(CheckpointError, match="other modules"):
        convert(tmp_path / "t", tmp_path / "c", **IN)
    path.write_text(json.dumps(record | {"base_config": record["base_config"] | {"rms_norm_eps": 0.5}}))
    with pytest.raises(CheckpointError, match="another model"):
        convert(tmp_path / "t", tmp_path / "c", **IN)


def test_dtype_is_that_of_what_is_written(tmp_path):
    head_model("sequential-own-norm", num_future_tokens=2).save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "t", dtype=torch.bfloat16, verify=True, **OUT)
    assert report.dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "t" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "t" / "config.json").read_text())["dtype"] == "bfloat16"
