import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from headway.data.tokenizers import byte_tokenizer, train_bpe_tokenizer
from headway.errors import CheckpointError, ConfigError
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.estimate import plan_training
from headway.training.events import StepDone
from headway.training.interruption import TrainingInterruptedError
from headway.training.loop import train
from headway.training.run_files import TOKENS
from headway.training.starting_model import model_from_folder
from small_runs import assert_same_run, lines, weights

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 258}
IDS = torch.arange(40).reshape(2, 20) * 6


def saved(folder, *, layers=4, n=3, seed=0, **options):
    torch.manual_seed(seed)
    model = MultiTokenLM.from_config(
        LlamaConfig(num_hidden_layers=layers, **SHAPE), MultiTokenConfig(num_future_tokens=n, **options)
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.eval()


def future(model):
    with torch.no_grad():
        return model(IDS, return_future_logits=True).future_logits


@pytest.fixture
def pretrained(tmp_path):
    return saved(tmp_path / "pretrained"), tmp_path / "pretrained"


def wanted(n, **options):
    return MultiTokenConfig(num_future_tokens=n, **options)


def test_the_same_heads_start_as_they_were(pretrained):
    model, folder = pretrained
    again = model_from_folder(folder, wanted(3)).eval()
    assert torch.equal(future(again), future(model))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


@pytest.mark.parametrize("n", [1, 2])
def test_the_farthest_heads_are_dropped(pretrained, n):
    model, folder = pretrained
    fewer = model_from_folder(folder, wanted(n)).eval()
    assert len(fewer.heads) == n - 1
    assert torch.equal(future(fewer), future(model)[:, :, :n])


def test_more_heads_start_as_copies_of_the_last_layer(pretrained):
    model, folder = pretrained
    more = model_from_folder(folder, wanted(5)).eval()
    assert torch.equal(future(more)[:, :, :3], future(model))
    # a head that copies the last layer predicts the next token
    assert torch.equal(future(more)[:, :, 3], future(model)[:, :, 0])
    assert torch.equal(future(more)[:, :, 4], future(model)[:, :, 0])


def test_a_plain_folder_gets_heads(tmp_path):
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **SHAPE)).eval()
    plain.save_pretrained(tmp_path / "plain")
    model = model_from_folder(tmp_path / "plain", wanted(3)).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert len(model.heads) == 2


def test_heads_of_another_kind_are_refused_unless_all_are_dropped(tmp_path):
    model = saved(tmp_path / "medusa", layers=2, heads="medusa", blocks_per_head=2)
    with pytest.raises(ConfigError, match=r"has heads with blocks_per_head=2: got blocks_per_head=1"):
        model_from_folder(tmp_path / "medusa", wanted(3, heads="medusa"))
    with pytest.raises(ConfigError, match=r"has heads with heads=medusa, blocks_per_head=2: got heads=transformer, "):
        model_from_folder(tmp_path / "medusa", wanted(3))
    again = model_from_folder(tmp_path / "medusa", wanted(3, heads="medusa", blocks_per_head=2)).eval()
    assert torch.equal(future(again), future(model))
    assert torch.equal(future(model_from_folder(tmp_path / "medusa", wanted(1)).eval()), future(model)[:, :, :1])


def test_heads_that_do_not_fit_are_refused_before_any_text_is_read(make_config, tmp_path):
    saved(tmp_path / "medusa", layers=2, heads="medusa", blocks_per_head=2)
    given = {"init_from": str(tmp_path / "medusa"), "hidden_size": None, "num_layers": None, "num_heads": None}
    with pytest.raises(ConfigError, match=r"has heads with blocks_per_head=2: got blocks_per_head=1"):
        train(make_config("run", heads="medusa", num_future_tokens=3, **given))
    assert not (tmp_path / "run" / TOKENS).exists()


def test_heads_in_the_next_token_path_stay_as_many_as_they_are(tmp_path):
    model = saved(tmp_path / "a", layers=5, wiring="anticausal", allow_base_change=True)
    same = wanted(3, wiring="anticausal", allow_base_change=True)
    assert torch.equal(future(model_from_folder(tmp_path / "a", same).eval()), future(model))
    # As a run asks for them: leave to change a pretrained base is none of its options, and not needed here.
    again = model_from_folder(tmp_path / "a", wanted(3, wiring="anticausal")).eval()
    assert torch.equal(future(again), future(model))
    for other in (wanted(1), replace(same, num_future_tokens=2)):
        with pytest.raises(ConfigError, match="part of its next-token path"):
            model_from_folder(tmp_path / "a", other)
    with pytest.raises(ConfigError) as refused:
        model_from_folder(tmp_path / "a", wanted(2))
    assert "has heads with wiring=anticausal: got wiring=parallel" in str(refused.value)
    # n = 1 is refused for them, so it is no way out.
    assert "drop the heads" not in str(refused.value)


def test_a_pretrained_base_gets_no_heads_on_its_next_token_path_from_a_run(tmp_path):
    model = saved(tmp_path / "n=1", n=1)
    model.base.save_pretrained(tmp_path / "plain")
    for name in ("n=1", "plain"):
        with pytest.raises(ConfigError, match="leave init_from out and train from scratch"):
            model_from_folder(tmp_path / name, wanted(3, wiring="anticausal"))


def test_folders_that_are_no_model_or_a_damaged_one_are_refused(pretrained, tmp_path):
    _, folder = pretrained
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal LM"):
        model_from_folder(tmp_path, wanted(2))
    heads = folder / "mtp" / "heads.safetensors"
    data = heads.read_bytes()
    heads.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated or was changed"):
        model_from_folder(folder, wanted(2))
    heads.write_bytes(data)
    other = saved(tmp_path / "other", seed=1)
    other.base.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="mixes two models"):
        model_from_folder(folder, wanted(3))


@pytest.fixture
def finetune(make_config, tmp_path, pretrained):
    def config(**overrides):
        start = {"hidden_size": None, "num_layers": None, "num_heads": None, "init_from": str(pretrained[1])}
        return make_config(overrides.pop("output", "run"), **(start | overrides))

    return config


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_run_starts_from_the_weights_of_a_folder(finetune, tmp_path, pretrained, n):
    result = train(finetune(num_future_tokens=n, steps=2, learning_rate=1e-9, checkpoint_every_steps=1))
    before = weights(pretrained[1])
    after = (
        weights(result.model_directory)
        if n > 1
        else dict(MultiTokenLM.from_pretrained(result.model_directory).base.state_dict())
    )
    for name, tensor in before.items():
        if name in after:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert MultiTokenLM.from_pretrained(result.model_directory).num_future_tokens == n
    assert len(lines(tmp_path / "run" / "metrics.jsonl")[0]["loss_per_offset"]) == n


def test_a_finetuning_run_resumes_bit_for_bit(finetune, tmp_path):
    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train(finetune(output="whole"))
    with pytest.raises(TrainingInterruptedError):
        train(finetune(output="again"), on_event=interrupt)
    train(finetune(output="again"))
    assert_same_run(tmp_path / "whole", tmp_path / "again", step=6)


def test_the_tokenizer_is_the_folders_own(finetune, pretrained):
    assert finetune().tokenizer_name == str(pretrained[1])
    assert replace(finetune(), tokenizer="bytes").tokenizer_name == "bytes"
    train_bpe_tokenizer([b"many words " * 50 + bytes(range(256))], vocabulary_size=300).save_pretrained(pretrained[1])
    with pytest.raises(ConfigError, match=r"vocab_size=258, tokenizer=.* needs"):
        train(finetune())


def test_a_plan_counts_the_pretrained_base_and_its_heads(finetune, pretrained):
    plan = plan_training(finetune(num_future_tokens=3))
    assert plan.total_parameters == sum(parameter.numel() for parameter in pretrained[0].parameters())


def test_a_base_too_short_for_the_rows_is_refused(finetune, pretrained):
    path = pretrained[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match=r"init_from=.* allows 32 positions"):
        train(finetune())
    with pytest.raises(ConfigError, match=r"init_from=.*absent cannot be read"):
        train(finetune(init_from=str(pretrained[1] / "absent"), tokenizer="bytes"))
