import json

import pytest
import torch

from headway.errors import ConfigError
from headway.evaluation.speed import Decoded, measure_speed, time_interleaved


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (length,), generator=generator) for length in (5, 9)]


def test_arms_take_turns_prompt_by_prompt_and_round_by_round():
    calls = []

    def arm(name, extra):
        def decode(row):
            calls.append((name, int(row[0, 0])))
            return Decoded(torch.cat([row, torch.full((1, extra), 7)], dim=1), forwards=2)

        return decode

    rows = [torch.tensor([[1]]), torch.tensor([[2, 2]])]
    timed = time_interleaved({"a": arm("a", 1), "b": arm("b", 3)}, rows, repeats=2)
    assert calls == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 2
    assert timed.outputs == {"a": [[7], [7]], "b": [[7] * 3, [7] * 3]}
    assert timed.forwards == {"a": 4, "b": 4}
    assert [len(seconds) for seconds in timed.seconds.values()] == [2, 2]


def test_a_measurement_reports_every_arm_every_round_and_that_the_texts_agree(model, prompts):
    speed = measure_speed(model, prompts, max_new_tokens=12, repeats=3, warmup=1)
    assert [arm.name for arm in speed.arms] == ["plain", "self-speculative", "hugging-face"]
    assert all(len(arm.rounds) == 3 and arm.new_tokens == 24 for arm in speed.arms)
    assert speed.identical
    assert speed.includes_prefill
    assert (speed.prompts, speed.max_new_tokens, speed.dtype, speed.device) == (2, 12, "float32", "cpu")
    json.dumps(speed.to_json(), allow_nan=False)


def test_a_ratio_is_paired_within_rounds(model, prompts):
    speed = measure_speed(model, prompts, max_new_tokens=8, repeats=3, warmup=0)
    plain, fast = speed.arm("plain").rounds, speed.arm("self-speculative").rounds
    ratios = sorted(mine / theirs for mine, theirs in zip(fast, plain, strict=True))
    ratio = speed.ratio("self-speculative", "plain")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx(tuple(ratios))


def test_the_cost_of_a_forward_pass_explains_the_speed_up(model, prompts):
    speed = measure_speed(model, prompts, max_new_tokens=8, repeats=1, warmup=0)
    assert speed.arm("plain").tokens_per_forward == speed.arm("hugging-face").tokens_per_forward == 1.0
    fast = speed.arm("self-speculative")
    assert fast.forwards <= fast.new_tokens
    assert speed.speedup_at(fast.tokens_per_forward) == pytest.approx(speed.ratio("self-speculative", "plain").median)
    assert speed.to_json()["forward_cost"] == speed.forward_cost


def test_a_measurement_leaves_the_mode_as_it_was(model, prompts):
    model.train()
    measure_speed(model, prompts, max_new_tokens=2, repeats=1, warmup=0)
    assert model.training


def test_an_interrupt_inside_a_generation_ends_the_measurement(model, prompts):
    calls = 0

    def interrupt(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    model.family.last_layer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_speed(model, prompts, max_new_tokens=12, repeats=1, warmup=0)


def test_nothing_to_measure_is_an_error(model):
    with pytest.raises(ConfigError, match="at least one prompt"):
        measure_speed(model, [], max_new_tokens=4)
