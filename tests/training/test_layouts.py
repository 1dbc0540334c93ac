import pytest

from headway.errors import ConfigError
from headway.training.config import TrainConfig
from headway.training.devices import Device, device_to_plan_for
from headway.training.estimate import plan_training
from headway.training.layouts import exchanged_bytes
from headway.training.step_time import estimate_step_time


def config(**fields):
    defaults = {"hidden_size": 64, "num_layers": 6, "num_heads": 2, "sequence_length": 32, "batch_size": 4}
    return TrainConfig(**(defaults | fields))


def plan(processes=1, **fields):
    return plan_training(config(**fields), processes=processes)


def test_one_process_can_only_hold_everything():
    found = plan()
    assert [(layout.parallel, layout.gradient_checkpointing) for layout in found.layouts] == [
        ("none", False),
        ("none", True),
    ]
    assert found.memory == found.layouts[0].memory


def test_every_way_of_sharing_is_planned_and_the_configured_one_is_chosen():
    found = plan(processes=4, parallel="fsdp", gradient_checkpointing=True)
    ways = [(layout.parallel, layout.processes, layout.gradient_checkpointing) for layout in found.layouts]
    assert ways == [(mode, 1 if mode == "none" else 4, on) for mode in ("none", "ddp", "fsdp") for on in (False, True)]
    assert found.memory == found.layouts[-1].memory
    assert found.memory.activations < found.layouts[-2].memory.activations


def test_ddp_holds_everything_on_each_device_and_fsdp_a_share_and_what_it_gathers():
    alone, _, ddp, _, fsdp, _ = (layout.memory for layout in plan(processes=4).layouts)
    assert ddp == alone
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp, part) == -(-getattr(alone, part) // 4)
    assert (fsdp.activations, fsdp.loss) == (alone.activations, alone.loss)
    # embedding, unembedding and norm with their gradients; two layers; the gradient of one
    width, vocabulary = 64, plan().vocabulary_size
    layer = 4 * width * width + 3 * width * 192 + 2 * width
    assert fsdp.gathered == 4 * (2 * (2 * vocabulary * width + width) + 3 * layer)


def test_a_step_has_the_tokens_of_all_processes():
    found = plan(processes=3, gradient_accumulation_steps=2, steps=10, warmup_steps=1)
    assert (found.micro_batches, found.tokens_per_step, found.tokens) == (2, 3 * 2 * 4 * 32, 10 * 3 * 2 * 4 * 32)


@pytest.mark.parametrize(("processes", "mode"), [(1, "fsdp"), (2, "none")])
def test_a_way_that_does_not_fit_the_processes_is_refused(processes, mode):
    with pytest.raises(ConfigError, match=f"parallel={mode}"):
        plan(processes=processes, parallel=mode)


def test_fsdp_sends_weights_and_gradients_for_every_micro_batch_and_ddp_gradients_once():
    assert exchanged_bytes(800, mode="none", processes=1, micro_batches=5) == 0
    assert exchanged_bytes(800, mode="ddp", processes=4, micro_batches=5) == 2 * 600
    assert exchanged_bytes(800, mode="fsdp", processes=4, micro_batches=5) == 3 * 600 * 5


DEVICE = Device("toy", 100.0, None, 10.0, 0.5, measured=False)


def test_the_time_of_a_step_is_operations_over_the_assumed_rate_and_the_optimizers_traffic():
    found = estimate_step_time(
        DEVICE,
        flops_per_token=20,
        tokens=30,
        processes=2,
        weight_bytes=8,
        optimizer_bytes=16,
        gradient_checkpointing=False,
        exchanged_bytes=7,
        steps=4,
    )
    assert found.compute_seconds == pytest.approx(20 * 30 / 2 / (100 * 0.5))
    assert found.optimizer_seconds == pytest.approx((3 * 8 + 2 * 16) / 10)
    assert found.tokens_per_second == pytest.approx(30 / found.seconds)
    assert found.run_seconds == pytest.approx(4 * found.seconds)


def test_recomputing_takes_a_third_more():
    times = [plan(gradient_checkpointing=on).time_on(DEVICE) for on in (False, True)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1].compute_seconds == pytest.approx(4 / 3 * times[0].compute_seconds)


def test_epochs_have_no_time_before_the_text_is_read():
    time = plan(epochs=2.0).time_on(DEVICE)
    assert time is not None
    assert time.run_seconds is None


def test_a_device_is_found_by_its_name_and_this_machine_is_measured():
    h100 = device_to_plan_for("h100", precision="bfloat16")
    assert (h100.name, h100.flops_per_second, h100.memory_bytes) == ("H100", 989.4e12, 80_000_000_000)
    this = device_to_plan_for("this", precision="float32")
    assert this.measured
    assert this.flops_per_second > 1e8
    assert this.bytes_per_second > 1e7


def test_an_unknown_device_and_one_without_a_peak_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'H100'"):
        device_to_plan_for("H10O", precision="bfloat16")
    with pytest.raises(ConfigError, match="no peak for precision=float32"):
        device_to_plan_for("B200", precision="float32")


def test_modules_that_all_depths_share_are_gathered_once():
    shared = plan(processes=2, heads="sequential", share_modules=True, num_layers=8)
    own = plan(processes=2, heads="sequential", num_layers=8)
    assert shared.layouts[-1].memory.weights < own.layouts[-1].memory.weights
    assert shared.layouts[-1].memory.gathered > 0
