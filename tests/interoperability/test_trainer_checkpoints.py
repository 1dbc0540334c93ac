"""What the Hugging Face Trainer saves is a headway folder, and what it loads brings the heads back, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from headway.data.tokenizers import byte_tokenizer
from headway.errors import CheckpointError
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import random_tokens, tiny_base, tiny_model
from trainer_cases import copy_of_state, rows, same_state, trainer

FAMILIES = ["llama", "llama-gqa-tied", "gpt2"]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
TOKENS = random_tokens(2, 12)


def all_logits(model: MultiTokenLM) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, return_future_logits=True, use_cache=False).future_logits


class Witness(TrainerCallback):
    """Copies the weights when training begins, and what the Trainer had to complain of on loading."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = copy_of_state(model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Per family: the folder of a whole run with checkpoints at steps 2, 4 and 6, and the weights at its end."""
    runs = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model(family)
        trainer(model, folder, **SAVING).train()
        runs[family] = (folder, copy_of_state(model))
    return runs


@pytest.fixture
def checkpoint(uninterrupted, tmp_path) -> Path:
    """A copy of the llama run's checkpoint at step 4, to be damaged."""
    return Path(shutil.copytree(uninterrupted["llama"][0] / "checkpoint-4", tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_headway_folders_with_a_plain_base_on_top(uninterrupted, family):
    folder, final = uninterrupted[family]
    again = MultiTokenLM.from_pretrained(folder / "checkpoint-6")
    assert same_state(again.state_dict(), final)
    plain, report = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, again.base(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_resumed_run_restores_base_and_heads_and_ends_where_the_uninterrupted_one_did(
    uninterrupted, tmp_path, family, by_name
):
    folder, final = uninterrupted[family]
    shutil.copytree(folder / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    witness = Witness()
    model = tiny_model(family, seed=7)
    resumed = trainer(model, tmp_path / "run", callbacks=[witness], **SAVING)
    loaded = []
    complain = resumed._issue_warnings_after_load
    resumed._issue_warnings_after_load = lambda result: (loaded.append(result), complain(result))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4") if by_name else True)
    saved = MultiTokenLM.from_pretrained(folder / "checkpoint-4").state_dict()
    assert same_state(witness.weights, saved)
    assert not same_state(saved, final)
    assert same_state(copy_of_state(model), final)
    assert [(result.missing_keys, result.unexpected_keys) for result in loaded] == [([], [])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_model_at_the_end_is_restored_bit_for_bit(tmp_path, family):
    model = tiny_model(family)
    # The largest loss counts as the best: that of the first checkpoint, which is not where the run ends.
    trained = trainer(
        model,
        tmp_path,
        eval_dataset=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **SAVING,
    )
    trained.train()
    assert Path(trained.state.best_model_checkpoint).name == "checkpoint-2"
    best = MultiTokenLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_state(copy_of_state(model), best.state_dict())
    last = MultiTokenLM.from_pretrained(tmp_path / "checkpoint-6")
    assert not same_state(last.heads.state_dict(), best.heads.state_dict())


def test_a_checkpoint_in_shards_resumes_as_well(uninterrupted, checkpoint):
    MultiTokenLM.from_pretrained(checkpoint).save_pretrained(checkpoint, overwrite=True, max_shard_size="40KB")
    assert not (checkpoint / "model.safetensors").exists()
    model = tiny_model(seed=7)
    trainer(model, checkpoint.parent, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    assert same_state(copy_of_state(model), uninterrupted["llama"][1])


def test_a_run_writes_again_over_its_own_checkpoints(uninterrupted, tmp_path):
    folder = Path(shutil.copytree(uninterrupted["llama"][0], tmp_path / "run"))
    trainer(tiny_model(seed=3), folder, **SAVING).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    again = MultiTokenLM.from_pretrained(folder / "checkpoint-6")
    assert same_state(again.state_dict(), uninterrupted["llama"][1])
    final = trainer(again, folder, processing_class=byte_tokenizer())
    for _ in range(2):
        final.save_model(str(tmp_path / "final"))
    assert torch.equal(all_logits(MultiTokenLM.from_pretrained(tmp_path / "final")), all_logits(again))
    assert (tmp_path / "final" / "tokenizer.json").is_file()


def test_a_loop_may_still_ask_that_nothing_be_overwritten(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m", is_main_process=True)
    with pytest.raises(CheckpointError, match="overwrite"):
        model.save_pretrained(tmp_path / "m", is_main_process=True, overwrite=False)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------ refusals


def remove_heads(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "mtp")


def truncate_heads(checkpoint: Path) -> None:
    path = checkpoint / "mtp" / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def exchange_the_base(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def change_the_record(checkpoint: Path) -> None:
    path = checkpoint / "mtp" / "config.json"
    record = json.loads(path.read_text())
    record["multi_token"]["num_future_tokens"] = 3
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (remove_heads, "has no heads"),
        (truncate_heads, "truncated"),
        (exchange_the_base, "mixes two models"),
        (change_the_record, "num_future_tokens=3, the model 4"),
    ],
)
def test_a_checkpoint_whose_heads_cannot_be_restored_stops_the_resume(checkpoint, damage, match):
    damage(checkpoint)
    model = tiny_model(seed=7)
    before = copy_of_state(model)
    with pytest.raises(CheckpointError, match=match):
        trainer(model, checkpoint.parent, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    assert same_state(copy_of_state(model), before)


def test_plain_base_weights_from_nowhere_are_refused_instead_of_skipped(checkpoint):
    model = tiny_model(seed=7)
    before = copy_of_state(model)
    with pytest.raises(CheckpointError, match=r"MultiTokenLM\.from_pretrained"):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    wrapped = torch.nn.ModuleDict({"module": model})
    with pytest.raises(CheckpointError, match="lose the heads"):
        wrapped.load_state_dict({f"module.{name}": t for name, t in tiny_base("llama").state_dict().items()}, False)
    assert same_state(copy_of_state(model), before)


def test_surplus_heads_are_refused_instead_of_skipped():
    model = tiny_model(num_future_tokens=2)
    with pytest.raises(CheckpointError, match="no place"):
        model.load_state_dict(tiny_model(num_future_tokens=4).state_dict(), strict=False)


def test_a_models_own_state_dict_and_parts_of_it_load_as_ever():
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    model.load_state_dict(other.state_dict())
    assert same_state(model.state_dict(), other.state_dict())
    third = tiny_model(seed=3)
    result = model.load_state_dict(
        {name: tensor for name, tensor in third.state_dict().items() if name.startswith("heads.0.")}, strict=False
    )
    assert not result.unexpected_keys
    assert same_state(model.heads[0].state_dict(), third.heads[0].state_dict())
    assert same_state(model.base.state_dict(), other.base.state_dict())
