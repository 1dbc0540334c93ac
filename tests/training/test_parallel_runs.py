"""Runs on two processes end as runs on one do, whatever ends them, and go on from each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from transformers import LlamaConfig

import distributed_runs
from distributed_runs import EVALUATION, RESTING, evaluators, settings
from headway.model.multi_token_lm import MultiTokenLM
from headway.training import run as run_module
from headway.training.compilation import has_cpp_compiler
from headway.training.events import Notice
from headway.training.interruption import TrainingInterruptedError
from headway.training.loop import train
from small_runs import lines, weights

pytestmark = pytest.mark.slow

MODES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs: those of the pair, and those of one process that belong to them."""
    folder = tmp_path_factory.mktemp("runs")
    shape = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        attention_dropout=0.3,
    )
    shape.save_pretrained(folder / "shape")
    train(settings(corpus, folder, "one", batch_size=4, **EVALUATION), evaluators=evaluators)
    train(settings(corpus, folder, "one-resting", batch_size=4, **RESTING))
    _stopped_after(settings(corpus, folder, "one-then-fsdp", gradient_accumulation_steps=2), step=3)
    _stopped_after(settings(corpus, folder, "one-then-two", batch_size=4), step=3)
    torch.multiprocessing.spawn(distributed_runs.do_all, args=(str(corpus), str(folder)), nprocs=2)
    train(settings(corpus, folder, "fsdp-then-one"), on_event=_heard(folder / "fsdp-then-one.txt"))
    return folder


def _heard(path: Path) -> Any:
    def listen(event: Any) -> None:
        if isinstance(event, Notice):
            with path.open("a", encoding="utf-8") as file:
                file.write(event.text + "\n")

    return listen


def _stopped_after(config: Any, *, step: int) -> None:
    real, calls = run_module.TrainingRun._stopping, []

    def stopping(run: Any, stop: Any) -> bool:
        calls.append(1)
        if run.state.step == step:
            stop.signal_number = 15
        return real(run, stop)

    run_module.TrainingRun._stopping = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(TrainingInterruptedError):
            train(config)
    finally:
        run_module.TrainingRun._stopping = real  # type: ignore[method-assign]


def heard(runs: Path, name: str, *, rank: int = 0) -> list[dict[str, Any]]:
    """Per attempt at a run how it ended in one process, and what it said."""
    return json.loads((runs / f"heard-{rank}.json").read_text(encoding="utf-8"))[name]


def curves(run: Path) -> torch.Tensor:
    """Loss of every step and offset."""
    rows = [line["loss_per_offset"] for line in lines(run / "metrics.jsonl")]
    return torch.tensor([[torch.nan if nats is None else nats for nats in row] for row in rows])


def largest_difference(left: Path, right: Path) -> float:
    ours, theirs = weights(left / "model"), weights(right / "model")
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_two_processes_has_the_losses_weights_and_figures_of_one(runs, mode):
    torch.testing.assert_close(curves(runs / mode), curves(runs / "one"), rtol=2e-6, atol=0)
    assert largest_difference(runs / mode, runs / "one") < 1e-4
    for ours, theirs in zip(
        lines(runs / mode / "evaluations.jsonl"), lines(runs / "one" / "evaluations.jsonl"), strict=True
    ):
        assert ours["nats"] == pytest.approx(theirs["nats"], rel=1e-5)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], rel=0.05)
        assert ours["walk_acceptance_length"] == pytest.approx(theirs["walk_acceptance_length"], rel=0.05)
        assert ours["decoded_acceptance_length"] == pytest.approx(theirs["decoded_acceptance_length"], rel=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_beside_a_checkpoint_is_whole_and_the_final_one(runs, mode):
    last = runs / mode / "checkpoints" / "step-00000006" / "model"
    assert weights(last).keys() == weights(runs / mode / "model").keys()
    model = MultiTokenLM.from_pretrained(last)
    assert model(torch.tensor([[1, 2, 3]]), return_future_logits=True).future_logits.shape == (1, 3, 3, 258)


@pytest.mark.parametrize("mode", MODES)
def test_heads_that_rest_for_some_steps_hold_nothing_up(runs, mode):
    assert heard(runs, f"{mode}-resting")[0]["end"] == "finished"
    weights_seen = {tuple(line["offset_weights"]) for line in lines(runs / f"{mode}-resting" / "metrics.jsonl")}
    assert any(0 in per_offset for per_offset in weights_seen)
    torch.testing.assert_close(
        curves(runs / f"{mode}-resting"), curves(runs / "one-resting"), rtol=2e-4, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_process_stops_all_and_the_resumed_run_is_bit_for_bit_the_straight_one(runs, mode):
    for rank in (0, 1):
        first, second = heard(runs, f"{mode}-stopped", rank=rank)
        assert first["end"].startswith("TrainingInterruptedError: SIGTERM: saved step 3")
        assert second["end"] == "finished"
    ours, theirs = weights(runs / f"{mode}-stopped" / "model"), weights(runs / f"{mode}-straight" / "model")
    assert {
        name: float((ours[name] - theirs[name]).abs().max()) for name in ours if not ours[name].equal(theirs[name])
    } == {}
    assert lines(runs / f"{mode}-stopped" / "metrics.jsonl") == lines(runs / f"{mode}-straight" / "metrics.jsonl")


@pytest.mark.skipif(not has_cpp_compiler(), reason="compiled layers need a C++ compiler")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_layers_train_on_two_processes_and_resume_bit_for_bit(runs, mode):
    torch.testing.assert_close(curves(runs / f"{mode}-compiled"), curves(runs / "one"), rtol=2e-5, atol=0)
    first, second = heard(runs, f"{mode}-compiled-stopped")
    assert first["end"].startswith("TrainingInterruptedError: SIGTERM: saved step 3")
    assert second["end"] == "finished"
    assert largest_difference(runs / f"{mode}-compiled-stopped", runs / f"{mode}-compiled") == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_both(runs, mode):
    assert heard(runs, f"{mode}-poisoned")[0]["end"] == "finished"
    applied = [line["applied"] for line in lines(runs / f"{mode}-poisoned" / "metrics.jsonl")]
    assert applied == [True, False, True, True, True, True]
    losses = [line["loss"] for line in lines(runs / f"{mode}-poisoned" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["fsdp-then-ddp", "fsdp-then-one", "one-then-fsdp"])
def test_a_run_goes_on_with_other_processes_where_it_stopped(runs, name):
    torch.testing.assert_close(curves(runs / name), curves(runs / "one"), rtol=1e-5, atol=0)


def test_other_numbers_of_processes_keep_the_rows_of_a_step_and_say_so(runs):
    said = (runs / "fsdp-then-one.txt").read_text(encoding="utf-8")
    assert "this run had 2 processes and now has 1: gradient_accumulation_steps is 2 instead of 1" in said
    told = heard(runs, "one-then-fsdp")[0]["heard"]
    assert any(
        "gradient_accumulation_steps is 1 instead of 2, so that a step keeps its 4 rows" in text for text in told
    )
    assert (
        "4 rows, which 2 processes cannot share in micro-batches of batch_size=4"
        in heard(runs, "one-then-two")[0]["end"]
    )


def test_a_damaged_shard_is_found_before_it_is_opened_and_the_checkpoint_before_is_used(runs):
    first, second = heard(runs, "fsdp-damaged")
    assert first["end"].startswith("TrainingInterruptedError")
    assert second["end"] == "finished"
    assert any("is damaged" in text and "distcp" in text for text in second["heard"])
    torch.testing.assert_close(curves(runs / "fsdp-damaged"), curves(runs / "one"), rtol=1e-5, atol=0)


def test_only_the_first_process_speaks_and_tells_errors(runs):
    assert heard(runs, "ddp")[0]["heard"]
    assert [attempt["heard"] for attempt in heard(runs, "ddp", rank=1)] == [[], []]
    assert heard(runs, "ddp")[1]["end"].startswith("TrainingError")
    assert heard(runs, "ddp", rank=1)[1]["end"].startswith("PeerError")
    assert heard(runs, "none")[0]["end"].startswith(
        "ConfigError: parallel=none would train the same model 2 times over"
    )


def test_moments_are_sharded_under_fsdp_and_whole_under_ddp(runs):
    sharded = runs / "fsdp" / "checkpoints" / "step-00000006"
    assert len(list((sharded / "optimizer").glob("*.distcp"))) == 2
    whole = load_file(runs / "ddp" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    assert any(name.startswith("exp_avg/") for name in whole)
    assert not (sharded / "optimizer.safetensors").exists()
