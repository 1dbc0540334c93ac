"""Every kind of heads goes through other people's loops: resumed by the Trainer, saved, reloaded and merged by PEFT."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from head_cases import head_model
from headway.model.lora import lora_module_names
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens
from trainer_cases import copy_of_state, rows, same_state, trainer

# One of every class of heads, with lists of layers, unembeddings and biases of their own among them.
ARCHITECTURES = [
    "transformer-2-layers",
    "causal",
    "anticausal-markov",
    "linear-tap-markov",
    "replicated",
    "medusa-2-blocks-shared-markov",
    "hydra",
    "sequential-shared",
]
TOKENS = random_tokens(2, 12)


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=TOKENS, return_future_logits=True, use_cache=False).future_logits
    return logits.nan_to_num(nan=-1e4)  # positions whose drafted tokens do not exist


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trainer_resumes_bit_for_bit(architecture, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = head_model(architecture)
    trainer(whole, tmp_path / "run", **options).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    resumed = head_model(architecture, seed=5)
    trainer(resumed, tmp_path / "again", **options).train(resume_from_checkpoint=True)
    assert same_state(copy_of_state(resumed), copy_of_state(whole))


def test_the_best_model_comes_back_where_the_base_is_kept_from_plain_loaders(tmp_path):
    model = head_model("anticausal-markov")
    trained = trainer(
        model,
        tmp_path,
        eval_dataset=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trained.train()
    best = MultiTokenLM.from_pretrained(trained.state.best_model_checkpoint)
    last = MultiTokenLM.from_pretrained(tmp_path / "checkpoint-3")
    assert same_state(copy_of_state(model), best.state_dict())
    assert not same_state(last.state_dict(), best.state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_reloads_and_merges_with_equal_logits(architecture, tmp_path):
    model = head_model(architecture)
    model.save_pretrained(tmp_path / "model")
    peft_model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **lora_module_names(model))
    )
    before = all_logits(peft_model)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        peft_model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = all_logits(peft_model.eval())
    assert bool(((after - before).abs().amax(dim=(0, 1, 3)) > 0.1).all()), "every offset has learnt something"
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(MultiTokenLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(all_logits(again), after)
    merged = again.merge_and_unload()
    torch.testing.assert_close(all_logits(merged), after, rtol=1e-5, atol=5e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "merged")), all_logits(merged))
