"""`headway train` takes every architecture, plans it, trains it and leaves a model that decodes."""

from __future__ import annotations

import typing
from typing import get_args

import pytest
import torch
from torch import nn

import headway.decoding.engine  # noqa: F401  (registers the engine)
from head_cases import ARCHITECTURES, head_model
from headway.errors import ConfigError, TrainingError
from headway.evaluation.offset_logits import evaluation_mode, offset_logit_chunks
from headway.heads.options import HeadArchitecture, HeadOptions, Wiring
from headway.model.multi_token_lm import MultiTokenLM
from headway.training.config import TrainConfig
from headway.training.estimate import plan_training
from headway.training.identity import check_same_run
from headway.training.initialization import scaled_initialization
from headway.training.loop import train
from headway.training.model_building import multi_token_config
from headway.training.optimizers import parameter_kinds
from small_runs import run_fields, write_corpus
from tiny_models import random_tokens

RUNS = ["anticausal", "linear-tap-markov", "replicated", "medusa-2-blocks-shared-markov", "hydra", "sequential-shared"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def options_of(name):
    return {field: value for field, value in ARCHITECTURES[name].items() if field != "allow_base_change"}


def run_config(corpus, output, name, **overrides):
    return TrainConfig(**run_fields(corpus, output, **(options_of(name) | overrides)))


def test_the_command_knows_the_same_architectures_and_options():
    hints = typing.get_type_hints(TrainConfig)
    assert get_args(hints["heads"]) == get_args(HeadArchitecture)
    assert get_args(hints["wiring"]) == get_args(Wiring)
    # A run from scratch needs no leave to change a base.
    assert set(HeadOptions.__dataclass_fields__) - {"allow_base_change"} <= set(hints)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_saves_and_decodes(name, corpus, tmp_path):
    config = run_config(corpus, tmp_path / "run", name, steps=3, initialization="scaled", num_layers=6)
    result = train(config)
    model = MultiTokenLM.from_pretrained(result.model_directory)
    assert model.mtp_config.head_options == multi_token_config(config).head_options or name == "anticausal"
    prompt = random_tokens(1, 5)
    plain = model.generate(prompt, max_new_tokens=8, num_draft_tokens=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=8), plain)


def test_a_run_is_not_resumed_with_other_heads(corpus, tmp_path):
    identity = {"num_future_tokens": 3, "model": {}, "tokenizer": "", "data": "", "held_out": None}
    saved = run_config(corpus, tmp_path / "run", "transformer", num_layers=8)
    for name in ("causal", "sequential"):
        now = run_config(corpus, tmp_path / "run", name, num_layers=8)
        with pytest.raises(TrainingError, match=r"heads was|wiring was"):
            check_same_run(identity, saved.to_dict(), identity=identity, config=now, source="checkpoint")
    # A checkpoint from before there was a choice.
    former = {key: value for key, value in saved.to_dict().items() if key not in HeadOptions.__dataclass_fields__}
    former.pop("heads")
    assert check_same_run(identity, former, identity=identity, config=saved, source="checkpoint") == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_counts_the_parameters_of_the_model_that_would_be_built(name, corpus, tmp_path):
    config = run_config(corpus, tmp_path / "run", name, num_layers=8)
    plan = plan_training(config)
    assert plan.head_parameters > 0
    assert plan.memory.total > plan.memory.weights
    on_top = plan_training(run_config(corpus, tmp_path / "run", name, num_layers=8, shorten_trunk=False))
    has_layers = multi_token_config(config).num_decoder_layers > 0
    assert (on_top.total_parameters > plan.total_parameters) == has_layers


def test_options_that_do_not_fit_are_refused_before_a_run(corpus, tmp_path):
    with pytest.raises(ConfigError, match="only medusa, hydra"):
        run_config(corpus, tmp_path / "run", "transformer", blocks_per_head=2)
    with pytest.raises(ConfigError, match="whose heads have 4 layers"):
        run_config(corpus, tmp_path / "run", "transformer-2-layers", num_layers=4)
    run_config(corpus, tmp_path / "run", "linear", num_layers=1, num_future_tokens=8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_onto_the_vocabulary_are_optimised_as_embeddings(name):
    model = head_model(name)
    kinds = parameter_kinds(model)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2 and model.config.vocab_size in parameter.shape:
            assert kinds[key] == "embedding", key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaled_initial_weights_keep_the_zeros_of_a_definition(name):
    model = MultiTokenLM.from_config(head_model(name).config, head_model(name).mtp_config, shorten_trunk=False)
    zero = [key for key, part in model.heads.named_modules() if isinstance(part, nn.Linear) and not part.weight.any()]
    scaled_initialization(model)
    parts = dict(model.heads.named_modules())
    assert [key for key in parts if isinstance(parts[key], nn.Linear) and not parts[key].weight.any()] == zero
    assert bool(zero) == name.startswith(("medusa", "hydra"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_in_chunks_sees_the_logits_of_a_full_forward(name):
    model, tokens = head_model(name, dtype=torch.float64), random_tokens(2, 9)
    with evaluation_mode(model):
        whole = model(tokens, return_future_logits=True).future_logits.flatten(0, 1)
        for chunk in offset_logit_chunks(model, tokens, chunk_tokens=4):
            expected = whole[chunk.positions, chunk.offset - 1]
            assert torch.equal(chunk.logits_PV.isnan(), expected.isnan())
            assert float((chunk.logits_PV - expected).abs().nan_to_num().max()) < 1e-6
