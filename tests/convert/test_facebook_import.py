"""A checkpoint in the authors' layout, written elsewhere, becomes a model that says the same at every offset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import meta_llama
from headway.convert.convert import convert
from headway.errors import CheckpointError, IncompatibleModelError
from headway.model.multi_token_lm import MultiTokenLM

TOKENS = torch.randint(0, meta_llama.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


def imported(source: Path, destination: Path, **options):
    return convert(source, destination, source_format="facebook", target_format="headway", **options)


def all_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return MultiTokenLM.from_pretrained(folder)(TOKENS, return_future_logits=True).future_logits


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 4},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1},
        {"n_kv_heads": None, "rope_theta": 500000.0, "norm_eps": 1e-3},
        {"n_layers": 4, "n_future_tokens": 4},
        {"n_layers": 3, "n_future_tokens": None},
        {"ffn_dim_multiplier": 1.3, "multiple_of": 8},
        {"vocab_size": -1},
    ],
    ids=str,
)
def test_logits_of_every_head_are_those_of_an_independent_forward(changes, tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb", **changes)
    report = imported(tmp_path / "fb", tmp_path / "hw")
    expected = meta_llama.forward(state, changes, TOKENS)
    found = all_logits(tmp_path / "hw")
    assert found.shape == expected.shape == (2, 20, report.num_future_tokens, meta_llama.VOCABULARY)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Offsets differ, so that one of them standing in for another would be seen.
    assert all((expected[:, :, 0] - expected[:, :, k]).abs().max() > 0.1 for k in range(1, expected.shape[2]))


def test_the_top_of_the_imported_folder_is_the_next_token_model(tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb")
    imported(tmp_path / "fb", tmp_path / "hw")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hw")
    assert plain.config.num_hidden_layers == 3
    expected = meta_llama.forward(state, {}, TOKENS)[:, :, 0]
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_own_precision(dtype, tmp_path):
    meta_llama.write_folder(tmp_path / "fb", dtype=dtype)
    report = imported(tmp_path / "fb", tmp_path / "hw", verify=True)
    assert report.dtype == str(dtype).removeprefix("torch.")
    model = MultiTokenLM.from_pretrained(tmp_path / "hw")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("split_vocabulary", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_model_parallel_ranks_are_put_together(ranks, split_vocabulary, tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb", n_kv_heads=4)
    imported(tmp_path / "fb", tmp_path / "one")
    meta_llama.write_ranks(tmp_path / "fb", state, ranks, split_vocabulary=split_vocabulary)
    imported(tmp_path / "fb", tmp_path / "many", verify=True)
    assert torch.equal(all_logits(tmp_path / "many"), all_logits(tmp_path / "one"))


def test_a_missing_rank_and_ranks_that_disagree_are_named(tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb", n_kv_heads=4)
    meta_llama.write_ranks(tmp_path / "fb", state, 4)
    last = tmp_path / "fb" / "consolidated.03.pth"
    weights = torch.load(last)
    torch.save(weights | {"norm.weight": weights["norm.weight"] + 1}, last)
    with pytest.raises(CheckpointError, match=r"norm\.weight must be the same on every rank"):
        imported(tmp_path / "fb", tmp_path / "hw")
    torch.save({name: tensor for name, tensor in weights.items() if "wq" not in name}, last)
    with pytest.raises(CheckpointError, match="not ranks of one model"):
        imported(tmp_path / "fb", tmp_path / "hw")
    last.unlink()
    with pytest.raises(CheckpointError, match=r"from 3 ranks: are there more.*of another shape"):
        imported(tmp_path / "fb", tmp_path / "hw")
    (tmp_path / "fb" / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="without a gap"):
        imported(tmp_path / "fb", tmp_path / "hw")
    assert not (tmp_path / "hw").exists()


def test_rotary_frequencies_are_left_out_and_said_so_or_refused_if_they_are_others(tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb")
    exact = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.save(state | {"rope.freqs": exact.to(torch.bfloat16)}, tmp_path / "fb" / "consolidated.00.pth")
    report = imported(tmp_path / "fb", tmp_path / "hw", verify=True)
    assert report.left_out == ("rope.freqs: the model computes them from rope_theta",)
    torch.save(state | {"rope.freqs": exact * 2}, tmp_path / "fb" / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="rope_theta"):
        imported(tmp_path / "fb", tmp_path / "other")


def test_unknown_and_missing_tensors_are_named(tmp_path):
    state = meta_llama.write_folder(tmp_path / "fb")
    state.pop("extra_heads.1.attention.wo.weight")
    state |= {"extra_heads.3.attention.wo.weight": torch.zeros(32, 32), "lora.a": torch.zeros(1)}
    torch.save(state, tmp_path / "fb" / "consolidated.00.pth")
    with pytest.raises(CheckpointError) as caught:
        imported(tmp_path / "fb", tmp_path / "hw")
    message = str(caught.value)
    assert "1 tensors missing: extra_heads.1.attention.wo.weight" in message
    assert "2 tensors that the model has no place for: extra_heads.3.attention.wo.weight, lora.a" in message
    assert not (tmp_path / "hw").exists()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dim": 64}, CheckpointError, "of another shape"),
        ({"n_layers": 7}, CheckpointError, "layers.3.attention.wk.weight"),
        ({"n_layers": 3}, CheckpointError, "counts the n - 1 extra heads"),
        ({"n_future_tokens": 3}, CheckpointError, r"extra_heads\.2\."),
        ({"multiple_of": 256}, CheckpointError, r"feed_forward.w1.weight is \(96, 32\) and must be \(256, 32\)"),
        ({"n_heads": 3}, CheckpointError, "do not divide"),
        ({"vocab_size": 41}, CheckpointError, "has 40 rows"),
        ({"n_heads": True}, CheckpointError, "whole number"),
        ({"norm_eps": "small"}, CheckpointError, "a number > 0"),
        ({"use_scaled_rope": True}, IncompatibleModelError, "use_scaled_rope=True"),
        ({"moe": {"num_experts": 8}}, IncompatibleModelError, "num_experts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parameters_that_do_not_describe_the_weights_are_refused(changes, error, match, tmp_path):
    meta_llama.write_folder(tmp_path / "fb")
    path = tmp_path / "fb" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=match) as caught:
        imported(tmp_path / "fb", tmp_path / "hw")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hw").exists()


def test_parameters_that_are_off_and_the_context_length_are_understood(tmp_path):
    meta_llama.write_folder(tmp_path / "fb", use_scaled_rope=False, max_seq_len=128, max_batch_size=32)
    imported(tmp_path / "fb", tmp_path / "hw")
    assert json.loads((tmp_path / "hw" / "config.json").read_text())["max_position_embeddings"] == 128


def test_what_params_do_not_say_is_said_in_the_report(tmp_path):
    meta_llama.write_folder(tmp_path / "7B_200B_4")
    report = imported(tmp_path / "7B_200B_4", tmp_path / "hw")
    assert any("max_position_embeddings=4096" in note for note in report.notes)
    assert any("no tokenizer" in note for note in report.notes)
    assert report.base_name == "7B_200B_4"
    assert json.loads((tmp_path / "hw" / "mtp" / "config.json").read_text())["base"]["name"] == "7B_200B_4"


def test_damaged_folders_are_one_clear_error(tmp_path):
    meta_llama.write_folder(tmp_path / "fb")
    weights = tmp_path / "fb" / "consolidated.00.pth"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        imported(tmp_path / "fb", tmp_path / "hw")
    weights.unlink()
    with pytest.raises(CheckpointError, match="half written"):
        imported(tmp_path / "fb", tmp_path / "hw")
    (tmp_path / "fb" / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        imported(tmp_path / "fb", tmp_path / "hw")
    (tmp_path / "fb" / "params.json").unlink()
    with pytest.raises(CheckpointError, match="not in format facebook"):
        imported(tmp_path / "fb", tmp_path / "hw")
