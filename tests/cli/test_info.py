"""`headway info`: true counts, honest memory, nothing allocated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig

from headway.cli.main import main
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.memory import attached_footprint, cache_footprint, footprint, kv_bytes_per_token, model_footprint
from headway.model.multi_token_lm import MultiTokenLM


def tiny_llama(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(fields | changes))


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main(["info", *arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    document = json.loads(printed.out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what saving a model wrote
    assert main(["info", *arguments]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    return printed.err


@pytest.mark.parametrize("tied", [False, True])
def test_footprint_counts_are_those_of_the_real_model(tied: bool):
    config, mtp_config = tiny_llama(tie_word_embeddings=tied), MultiTokenConfig(num_future_tokens=3)
    model = MultiTokenLM.from_config(config, mtp_config)
    counted = footprint(config, mtp_config, dtype=torch.float32)
    assert counted == model_footprint(model, dtype=torch.float32)
    assert counted.total_parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert counted.embedding_parameters == 50 * 32
    assert counted.unembedding_parameters == (0 if tied else 50 * 32)
    assert counted.weight_bytes == 4 * counted.total_parameters


def test_footprint_from_scratch_is_that_of_the_plain_model_whatever_n_is():
    counts = {
        footprint(tiny_llama(), MultiTokenConfig(num_future_tokens=n), dtype=torch.float32).total_parameters
        for n in (1, 2, 4)
    }
    assert counts == {LlamaForCausalLM(tiny_llama()).num_parameters()}


def test_attached_heads_come_on_top_of_the_base():
    plain = attached_footprint(tiny_llama(), MultiTokenConfig(num_future_tokens=1), dtype=torch.float32)
    with_heads = attached_footprint(tiny_llama(), MultiTokenConfig(num_future_tokens=3), dtype=torch.float32)
    assert plain.head_parameters == 0
    assert with_heads.total_parameters == plain.total_parameters + with_heads.head_parameters
    assert with_heads.cache.layers == plain.cache.layers + 2


def test_nothing_is_allocated_for_a_model_that_no_machine_here_could_hold():
    huge = tiny_llama(hidden_size=16384, intermediate_size=65536, num_hidden_layers=200, vocab_size=256_000)
    assert footprint(huge, MultiTokenConfig(num_future_tokens=4), dtype=torch.float32).weight_bytes > 2**40


def test_cache_bytes_count_grouped_heads_and_the_heads_own_layers():
    # 2 (keys, values) x (4 + 2 layers) x 2 key-value heads x 8 wide x 2 bytes
    assert kv_bytes_per_token(tiny_llama(), 3, torch.bfloat16) == 2 * 6 * 2 * 8 * 2
    assert kv_bytes_per_token(GPT2Config(n_embd=32, n_head=4, n_layer=3), 1, torch.float32) == 2 * 3 * 32 * 4


def test_cache_bytes_are_those_that_a_forward_really_keeps():
    model = attach_heads(LlamaForCausalLM(tiny_llama()), MultiTokenConfig(num_future_tokens=3)).eval()
    output = model(torch.arange(10)[None], use_cache=True, return_future_logits=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    cache = model_footprint(model, dtype=torch.float32).cache
    assert cache.total_bytes(context_length=10) == kept


def test_sliding_layers_are_counted_and_heads_slide_as_the_last_layer_does():
    mistral = MistralConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, sliding_window=8)
    cache = cache_footprint(mistral, 2, dtype=torch.float32)
    assert (cache.layers, cache.sliding_layers, cache.sliding_window) == (4, 4, 8)
    assert cache.windowed_bytes(context_length=100) == cache.total_bytes(context_length=8)
    assert cache.windowed_bytes(context_length=5) == cache.total_bytes(context_length=5)


def test_info_without_a_model_says_what_works_here(capsys: pytest.CaptureFixture[str]):
    document = info(capsys)
    assert document["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert document["threads"] == torch.get_num_threads()
    assert document["works_here"]["compiled_layers"] == (document["cpp_compiler"] is not None)


def test_info_without_a_compiler_says_that_layers_are_not_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["info"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["works_here"]["compiled_layers"] is False
    assert "layers are not compiled" in printed.err


def test_info_of_a_paper_size(capsys: pytest.CaptureFixture[str]):
    document = info(capsys, "30M", "--num-future-tokens", "4", "--vocabulary-size", "32000", "--context-length", "512")
    assert document["parameters"]["non_embedding"] == pytest.approx(30e6, rel=0.1)
    assert (document["layers"], document["head_layers"]) == (10, 3)
    assert document["kv_cache"]["bytes"] == 512 * document["kv_cache"]["bytes_per_token"]


def test_info_of_a_headway_folder_reads_its_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = MultiTokenLM.from_config(tiny_llama(), MultiTokenConfig(num_future_tokens=3)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    document = info(capsys, str(tmp_path / "model"), "--batch-size", "2")
    assert document["kind"] == "headway folder"
    assert document["model"] == "model"
    assert document["num_future_tokens"] == 3
    assert document["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert document["kv_cache"]["dtype"] == "bfloat16"
    assert document["kv_cache"]["bytes"] == 2 * 64 * 2 * 4 * 2 * 8 * 2


def test_info_of_a_plain_folder_says_what_heads_would_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=64)).save_pretrained(tmp_path)
    plain = info(capsys, str(tmp_path))
    heads = info(capsys, str(tmp_path), "-n", "4", "--dtype", "float16")
    assert plain["kind"] == heads["kind"] == "plain Hugging Face folder"
    assert plain["parameters"]["unembedding"] == 0
    assert plain["parameters"]["heads"] == 0 < heads["parameters"]["heads"]
    assert heads["parameters"]["total"] - plain["parameters"]["total"] == heads["parameters"]["heads"]
    assert heads["kv_cache"]["dtype"] == "float16"


def test_info_names_no_folder_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    LlamaForCausalLM(tiny_llama()).save_pretrained(tmp_path / "here")
    main(["info", str(tmp_path / "here")])
    assert str(tmp_path) not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["31M"], "the sizes are 1M, 3M"),
        (["./nowhere"], "neither a folder here nor a size"),
        (["1M", "-n", "9"], "lower num_future_tokens to 5"),
        (["1M", "--vocabulary-size", "0"], "--vocabulary-size"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refused(capsys, *arguments)


def test_folders_that_cannot_be_described_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "has no config.json" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 50}')
    assert "families that work" in refused(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert "config.json" in refused(capsys, str(tmp_path))


def test_options_that_do_not_fit_a_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    MultiTokenLM.from_config(tiny_llama(), MultiTokenConfig(num_future_tokens=3)).save_pretrained(tmp_path / "model")
    assert "its heads are for 3" in refused(capsys, str(tmp_path / "model"), "-n", "2")
    assert "is a folder and has its own" in refused(capsys, str(tmp_path / "model"), "--vocabulary-size", "5")
