"""PEFT: LoRA on the base with whole heads trains, reloads, merges and generates without losing a head."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

# The public names bring the decoding engine along.
from headway import MultiTokenLM
from headway.errors import CheckpointError, IncompatibleModelError
from headway.model.lora import lora_module_names
from tiny_models import random_tokens, tiny_base, tiny_model
from trainer_cases import copy_of_state, rows, same_state, trainer

FAMILIES = ["llama", "llama-gqa-tied", "gemma2", "gpt2"]
TOKENS = random_tokens(2, 12)
PROMPT = TOKENS[:, :6]


def all_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, return_future_logits=True, use_cache=False).future_logits


def lora_config(model: MultiTokenLM, **options) -> LoraConfig:
    arguments = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **lora_module_names(model)} | options
    return LoraConfig(**arguments)


def trained(model, *, steps: int = 3, learning_rate: float = 1e-2):
    """Some steps of AdamW over whatever trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_trains_reloads_and_merges_with_equal_logits_at_every_offset(folder, tmp_path):
    model = MultiTokenLM.from_pretrained(folder)
    before = all_logits(model)
    peft_model = trained(get_peft_model(model, lora_config(model)))
    after = all_logits(peft_model)
    assert bool(((after - before).abs().amax(dim=(0, 1, 3)) > 0.1).all()), "every offset has learnt something"
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(MultiTokenLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(all_logits(again), after)

    merged = again.merge_and_unload()
    assert type(merged) is MultiTokenLM
    merged_logits = all_logits(merged)
    assert float((merged_logits - after).abs().max() / after.abs().max()) < 3e-6
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "merged")), merged_logits)


def test_merging_is_exact_in_float64():
    model = tiny_model(dtype=torch.float64)
    peft_model = trained(get_peft_model(model, lora_config(model)))
    after = all_logits(peft_model)
    torch.testing.assert_close(all_logits(peft_model.merge_and_unload()), after, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_generation_equals_plain_greedy_wrapped_and_merged(folder):
    model = MultiTokenLM.from_pretrained(folder)
    peft_model = trained(get_peft_model(model, lora_config(model)), steps=8)
    plain = model.base.generate(PROMPT, max_new_tokens=16, do_sample=False)
    wrapped = peft_model.generate(input_ids=PROMPT, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(wrapped.sequences, plain)
    assert wrapped.mode == "self-speculative"
    assert wrapped.acceptance.mean_acceptance_length > 1
    merged = peft_model.merge_and_unload()
    assert torch.equal(merged.generate(PROMPT, max_new_tokens=16, do_sample=False), plain)


def test_names_cover_the_base_without_its_unembedding_and_every_head():
    model = tiny_model(num_future_tokens=3)
    names = lora_module_names(model)
    assert names["modules_to_save"] == ["heads.0", "heads.1"]
    assert len(names["target_modules"]) == 3 * 7
    assert all(name.startswith("base.model.layers.") for name in names["target_modules"])
    peft_model = get_peft_model(model, lora_config(model))
    trains = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert {"lora_" in name or ".heads." in name for name in trains} == {True}
    assert not [name for name in trains if "lora_" in name and ".heads." in name]
    single = lora_module_names(tiny_model(num_future_tokens=1))
    assert single["modules_to_save"] == []


def test_a_parameter_that_peft_could_not_save_is_named():
    model = tiny_model()
    model.heads.register_parameter("mixture", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(IncompatibleModelError, match=r"heads\.mixture"):
        lora_module_names(model)


def test_adapters_that_are_not_merged_are_not_saved_as_a_model(tmp_path):
    model = tiny_model()
    peft_model = get_peft_model(model, lora_config(model))
    for save in (model.save_pretrained, model.save_heads):
        with pytest.raises(CheckpointError, match="merge"):
            save(tmp_path / "m")
    heads_only = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(CheckpointError, match="merge"):
        heads_only.get_base_model().save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    peft_model.unload().save_pretrained(tmp_path / "m")
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "m")), all_logits(tiny_model()))


def test_adapters_of_the_base_alone_are_not_saved_as_a_model(tmp_path):
    base = tiny_base("llama")
    base.add_adapter(LoraConfig(target_modules=["q_proj"]))
    from_the_start = MultiTokenLM(base, tiny_model().mtp_config)
    later = tiny_model()
    later.base.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for model in (from_the_start, later):
        with pytest.raises(CheckpointError, match="merge"):
            model.save_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "where", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}]
)
def test_adapters_on_what_the_heads_share_are_refused(where):
    model = tiny_model()
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | where)))
    with pytest.raises(IncompatibleModelError, match="modules_to_save"):
        peft_model(input_ids=TOKENS, labels=TOKENS)


def test_an_adapter_of_more_heads_than_the_model_has_is_refused(tmp_path):
    model = tiny_model(num_future_tokens=4)
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="num_future_tokens=2"):
        PeftModel.from_pretrained(tiny_model(num_future_tokens=2), tmp_path / "adapter")


def test_disabled_adapters_give_the_first_model_back():
    model = tiny_model()
    before = all_logits(model)
    peft_model = trained(get_peft_model(model, lora_config(model)))
    with peft_model.disable_adapter():
        assert torch.equal(all_logits(peft_model), before)


# ------------------------------------------------------------------------------------------------ with the Trainer


def test_the_trainer_resumes_an_adapter_with_its_heads_and_picks_the_best(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

    def fresh() -> PeftModel:
        model = MultiTokenLM.from_pretrained(tmp_path / "model")
        torch.manual_seed(0)
        return get_peft_model(model, lora_config(model))

    whole = fresh()
    trainer(whole, tmp_path / "run", gradient_checkpointing=True, **options).train()
    final = copy_of_state(whole)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    resumed = fresh()
    trainer(resumed, tmp_path / "again", gradient_checkpointing=True, **options).train(resume_from_checkpoint=True)
    assert same_state(copy_of_state(resumed), final)

    best = fresh()
    chosen = trainer(
        best,
        tmp_path / "best",
        eval_dataset=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **options,
    )
    chosen.train()
    saved = PeftModel.from_pretrained(MultiTokenLM.from_pretrained(tmp_path / "model"), tmp_path / "best/checkpoint-2")
    assert chosen.state.best_model_checkpoint.endswith("checkpoint-2")
    assert torch.equal(all_logits(best.eval()), all_logits(saved))


def test_lora_and_whole_heads_reach_the_loss_that_the_trainer_reports(tmp_path):
    model = tiny_model()
    wrapped = get_peft_model(copy.deepcopy(model), lora_config(model))
    data = rows(4, ragged=True)
    figures = []
    for candidate in (model, wrapped):
        started = trainer(candidate, tmp_path, train_dataset=data, eval_dataset=data, max_steps=1)
        figures.append(started.evaluate()["eval_loss"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
