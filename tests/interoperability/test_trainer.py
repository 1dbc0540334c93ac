"""The Hugging Face Trainer, as it is, trains and evaluates a multi-token model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from headway.data.tokenizers import byte_tokenizer
from headway.errors import ConfigError
from headway.functional.targets import count_valid_targets
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import tiny_base, tiny_model
from trainer_cases import copy_of_state, logged, pad, rows, trainer


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def summed_over_next_token_targets(model: MultiTokenLM, batch: dict[str, torch.Tensor]) -> float:
    """Every offset's nats, divided by the number of next-token targets: what one count for all offsets means."""
    with torch.no_grad():
        per_offset_N = model(**batch).loss_per_offset
    counts_N = count_valid_targets(
        batch["labels"], num_future_tokens=model.num_future_tokens, attention_mask_BT=batch["attention_mask"]
    )
    return float((per_offset_N * counts_N).sum() / counts_N[0])


def test_the_loss_falls_in_the_base_and_in_every_head(tmp_path):
    model = tiny_model()
    batch = pad(rows(24))
    before = model(**batch).loss_per_offset
    trained = trainer(model, tmp_path, max_steps=18)
    trained.train()
    losses = logged(trained)
    assert losses[-1] < 0.8 * losses[0]
    assert bool((model(**batch).loss_per_offset < 0.9 * before).all())


def test_the_first_logged_loss_is_the_models_own_over_the_next_token_targets(tmp_path):
    model = tiny_model(offset_weights=(1.0, 1.0, 1.0, 1.0))
    data = rows(4, ragged=True)
    expected = summed_over_next_token_targets(model, pad(data))
    trained = trainer(model, tmp_path, train_dataset=data, max_steps=1)
    trained.train()
    assert logged(trained)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_four_micro_batches_of_one_row_are_one_batch_of_four(tmp_path, ragged):
    states, losses = [], []
    for micro, accumulated in ((4, 1), (1, 4), (2, 2)):
        model = tiny_model()
        trained = trainer(
            model,
            tmp_path,
            train_dataset=rows(12, ragged=ragged),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_steps=3,
        )
        trained.train()
        states.append(copy_of_state(model))
        losses.append(logged(trained))
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert largest_difference(states[0], state) < 2e-6
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_with_one_future_token_it_is_the_plain_models_training(tmp_path):
    base = tiny_base("llama")
    model = attach_heads(copy.deepcopy(base), MultiTokenConfig(num_future_tokens=1))
    data = rows(12, ragged=True)
    plain = trainer(base, tmp_path, train_dataset=data, optim="sgd", gradient_accumulation_steps=2, max_steps=3)
    multi = trainer(model, tmp_path, train_dataset=data, optim="sgd", gradient_accumulation_steps=2, max_steps=3)
    plain.train()
    multi.train()
    assert logged(multi) == pytest.approx(logged(plain), rel=1e-5)
    assert largest_difference(copy_of_state(base), copy_of_state(model.base)) < 1e-6


def test_gradient_checkpointing_changes_nothing(tmp_path):
    states = []
    for checkpointing in (False, True):
        model = tiny_model()
        trainer(model, tmp_path, gradient_checkpointing=checkpointing, optim="sgd", max_steps=2).train()
        assert model.is_activation_checkpointing == checkpointing
        states.append(copy_of_state(model))
    assert largest_difference(*states) < 1e-6


def test_bf16_trains_float32_weights_along_the_same_losses(tmp_path):
    losses = []
    for bf16 in (False, True):
        model = tiny_model()
        trained = trainer(model, tmp_path, bf16=bf16, learning_rate=1e-3)
        trained.train()
        losses.append(logged(trained))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer's fp16 needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_on_a_gpu(tmp_path, precision):
    model = tiny_model()
    trained = trainer(model, tmp_path, use_cpu=False, max_steps=18, **{precision: True})
    trained.train()
    losses = logged(trained)
    assert losses[-1] < 0.8 * losses[0]


def test_the_usual_collator_for_causal_language_models_serves(tmp_path):
    tokenizer = byte_tokenizer()
    model = attach_heads(tiny_base("llama", vocab_size=len(tokenizer)), MultiTokenConfig(num_future_tokens=3))
    texts = [f"def f{index}(x):\n    return x + {index}\n" + "#" * index for index in range(12)]
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    trained = trainer(
        model,
        tmp_path,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    before = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < before


def test_documents_packed_without_padding_train_as_padded_rows_do(tmp_path):
    data = rows(8, ragged=True)
    for row in data:
        row["labels"] = list(row["input_ids"])
    states = []
    for collator in (pad, DataCollatorWithFlattening()):
        model = tiny_model()
        trainer(model, tmp_path, train_dataset=data, data_collator=collator, optim="sgd", max_steps=2).train()
        states.append(copy_of_state(model))
    assert largest_difference(*states) < 5e-6


# ------------------------------------------------------------------------------------------------ evaluation


def test_predictions_are_the_plain_models_logits(tmp_path):
    model = tiny_model()
    data = rows(6)
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.mean())}

    evaluator = trainer(model, tmp_path, eval_dataset=data, compute_metrics=compute_metrics)
    metrics = evaluator.evaluate()
    with torch.no_grad():
        expected = model.base(pad(data)["input_ids"]).logits.numpy()
    np.testing.assert_allclose(seen[0].predictions, expected, atol=1e-5)
    assert seen[0].label_ids.shape == expected.shape[:2]
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_loss"] == pytest.approx(summed_over_next_token_targets(model, pad(data)), rel=1e-5)
    assert evaluator.predict(data).predictions.shape == expected.shape
    unlabelled = [{"input_ids": row["input_ids"]} for row in data]
    evaluator.data_collator = lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}
    np.testing.assert_allclose(evaluator.predict(unlabelled).predictions, expected, atol=1e-5)


def test_evaluation_in_the_middle_of_training_disturbs_neither(tmp_path):
    states, losses = [], []
    for strategy in ("no", "steps"):
        model = tiny_model()
        trained = trainer(
            model,
            tmp_path,
            eval_dataset=rows(5, seed=9),
            eval_strategy=strategy,
            eval_steps=2,
            prediction_loss_only=True,
            per_device_eval_batch_size=2,
        )
        trained.train()
        states.append(copy_of_state(model))
        losses.append(logged(trained, "eval_loss"))
    assert largest_difference(*states) == 0
    assert losses[0] == []
    assert len(losses[1]) == 3


def test_label_smoothing_which_would_train_no_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        trainer(tiny_model(), tmp_path, label_smoothing_factor=0.1).train()
