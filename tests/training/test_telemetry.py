"""Operations, peaks and shares of sources: counted, not guessed."""

import json
from typing import get_args

import pytest
import torch

from headway.data.mixture import Mixture, MixturePart
from headway.data.tokenizers import load_tokenizer
from headway.errors import ConfigError
from headway.heads.options import HeadArchitecture
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.sizes import PAPER_SIZES, feed_forward_width, paper_config
from headway.training import telemetry as telemetry_module
from headway.training.data_mix import DataMix
from headway.training.flops import mean_context, training_flops_per_token
from headway.training.loop import train
from headway.training.model_building import base_config
from headway.training.peak import measured_peak, peak_by_name, peak_flops_per_second
from headway.training.telemetry import Telemetry, resident_bytes
from small_runs import lines, write_corpus


def model_of(name="1M", *, n, **options):
    with torch.device("meta"):
        return MultiTokenLM.from_config(
            paper_config(name, vocab_size=300), MultiTokenConfig(num_future_tokens=n, **options)
        )


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["1M", "10M"])
def test_operations_are_six_times_the_weights_of_layers_and_unembeddings_and_causal_attention(name, n):
    size, length = PAPER_SIZES[name], 128
    layer = 4 * size.dim**2 + 3 * size.dim * feed_forward_width(size.dim)
    weights = size.layers * layer + n * 300 * size.dim
    attention = 12 * size.layers * size.dim * (length + 1) / 2
    counted = training_flops_per_token(model_of(name, n=n), sequence_length=length)
    assert counted == 6 * weights + attention


def test_every_head_counts_with_what_it_multiplies_by():
    trunk_layers, n, vocabulary, width = PAPER_SIZES["1M"].layers, 3, 300, 128
    plain = training_flops_per_token(model_of(n=1), sequence_length=64)
    per_layer = 12 * width * 65 // 2
    linear = training_flops_per_token(model_of(n=n, heads="linear"), sequence_length=64)
    # linear heads take no layer from the trunk: the plain model, two matrices of its width, two more unembeddings
    assert linear == plain + 6 * 2 * (width**2 + vocabulary * width)
    markov = training_flops_per_token(model_of(n=n, markov_rank=16), sequence_length=64)
    without = training_flops_per_token(model_of(n=n), sequence_length=64)
    assert markov == without + 6 * 2 * 16 * vocabulary
    assert plain > trunk_layers * per_layer


@pytest.mark.parametrize("heads", get_args(HeadArchitecture))
def test_every_architecture_can_be_counted(heads):
    plain = training_flops_per_token(model_of(n=1), sequence_length=64)
    assert training_flops_per_token(model_of(n=3, heads=heads), sequence_length=64) > plain


def test_a_sliding_window_shortens_the_context():
    def plain(length, window):
        return sum(min(position, window) for position in range(1, length + 1)) / length

    for length, window in ((1, 4), (7, 3), (16, 16), (16, 40)):
        assert mean_context(length, window=window) == pytest.approx(plain(length, window))


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16-residual", 756.0),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16", None),
        ("NVIDIA A1000", "bfloat16", None),
        ("NVIDIA B200", "float32", None),
        ("Tesla T4", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_the_product_and_unknown_ones_stay_unknown(name, precision, teraflops):
    found = peak_by_name(name, precision=precision)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_float32_products_in_tf32_have_the_peak_of_tf32(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_by_name("NVIDIA A100-SXM4-40GB", precision="float32") == 156e12


def test_a_cpu_has_no_peak_unless_it_is_given_or_measured():
    cpu = torch.device("cpu")
    assert peak_flops_per_second("auto", device=cpu, precision="float32") is None
    assert peak_flops_per_second("2.5", device=cpu, precision="float32") == 2.5e12
    assert 1e8 < measured_peak(cpu, torch.float32) < 1e15


@pytest.mark.parametrize("text", ["fast", "0", "-3", "inf", "nan"])
def test_a_peak_that_is_none_is_refused(make_config, text):
    with pytest.raises(ConfigError, match="mfu_peak takes auto, measure, or the peak"):
        make_config(mfu_peak=text)


def test_on_gpus_the_peak_is_that_of_all_of_them_and_memory_that_of_the_own_one(make_config, monkeypatch):
    config = make_config(precision="bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123 * device.index)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    shape = base_config(config, load_tokenizer("bytes"))
    telemetry = Telemetry(config, shape, rows=FixedRows(9), device=torch.device("cuda", 3))
    assert telemetry.peak_flops_per_second == pytest.approx(8 * 989.4e12)
    cost = telemetry.cost(tokens=1000, rows=5, tokens_per_second=2e6)
    assert cost.gpu_peak_bytes == 369
    assert cost.mfu == pytest.approx(2e6 * telemetry.flops_per_token / (8 * 989.4e12))
    assert cost.flops == 1000 * telemetry.flops_per_token


def test_a_model_that_cannot_be_counted_has_neither_operations_nor_mfu(make_config, monkeypatch):
    config = make_config(mfu_peak="3", hidden_size=40)

    def reads_values(model, **options):
        raise RuntimeError("cannot look at a value")

    monkeypatch.setattr(telemetry_module, "training_flops_per_token", reads_values)
    shape = base_config(config, load_tokenizer("bytes"))
    telemetry = Telemetry(config, shape, rows=FixedRows(9), device=torch.device("cpu"))
    cost = telemetry.cost(tokens=1000, rows=5, tokens_per_second=2e6)
    assert (cost.flops, cost.mfu, telemetry.flops(7)) == (None, None, None)


class FixedRows:
    sequence_length = 8

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


def test_shares_are_those_of_the_rows_that_were_drawn_in_whatever_order_they_are_asked_for():
    parts = [MixturePart("code", FixedRows(5), 2.0), MixturePart("text", FixedRows(40), 1.0)]
    mixture = Mixture([*parts, MixturePart("rest", FixedRows(9), 0.5)], seed=3)
    mix = DataMix(mixture)
    drawn = [mixture.locate(row)[0] for row in range(60)]
    for rows in (1, 2, 6, 7, 20, 60, 13, 59, 60):
        shares = mix.shares(rows)
        assert [share.source for share in shares] == ["code", "text", "rest"]
        assert [share.drawn for share in shares] == [drawn[:rows].count(number) / rows for number in range(3)]
        assert [share.asked for share in shares] == [4 / 7, 2 / 7, 1 / 7]
    assert DataMix(FixedRows(3)).shares(2) is None


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell a process its memory")
def test_memory_in_ram_is_that_of_this_process():
    before = resident_bytes()
    held = torch.ones(60_000_000)
    assert 200_000_000 < resident_bytes() - before < 400_000_000
    assert held.sum() > 0


def test_a_run_tells_all_of_it_in_its_lines(make_config, tmp_path):
    texts, other = write_corpus(tmp_path / "texts"), write_corpus(tmp_path / "other")
    options = {"eval_every_steps": 3, "log_every_steps": 3, "offset_weights": [1, 1, 0.5], "batch_size": 4}
    config = make_config(
        data=[f"{texts}::weight=3", f"{other}::weight=1"], mfu_peak="0.001", drop_near_duplicates=False, **options
    )

    def evaluate(model, step):
        return {"figure": 1.0}

    train(config, evaluators=[evaluate])
    steps, evaluations = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "evaluations.jsonl")
    assert [record["step"] for record in steps] == [3, 6]
    mfu = [json.loads(line)["mfu"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(share > 0 for share in mfu)
    tokens = 6 * config.tokens_per_step
    assert steps[-1]["tokens"] == evaluations[-1]["tokens"] == tokens
    per_token = steps[-1]["flops"] // tokens
    assert per_token * tokens == steps[-1]["flops"] == evaluations[-1]["flops"]
    assert steps[0]["flops"] * 2 == steps[1]["flops"]
    assert steps[-1]["offset_weights"] == [1, 1, 0.5]
    assert all(0 <= share <= 1 for share in steps[-1]["accuracy_per_offset"])
    assert len(steps[-1]["accuracy_per_offset"]) == 3
    assert [(share["source"], share["asked"]) for share in steps[-1]["data_mix"]] == [("texts", 0.75), ("other", 0.25)]
    assert [share["drawn"] for share in steps[-1]["data_mix"]] == [0.75, 0.25]
