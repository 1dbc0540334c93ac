import math

import pytest

from headway.training.schedule import learning_rate_factor


def test_warm_up_is_linear_and_ends_at_the_peak():
    factors = [learning_rate_factor(step, steps=100, warmup_steps=10, decay_ratio=0.03) for step in range(1, 11)]
    assert factors == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("warmup", [0, 1, 25])
def test_the_decay_is_the_cosine_from_the_peak_to_the_ratio(warmup):
    for step in range(warmup + 1, 101):
        progress = (step - warmup) / (100 - warmup)
        wanted = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))
        assert learning_rate_factor(step, steps=100, warmup_steps=warmup, decay_ratio=0.03) == pytest.approx(wanted)


def test_the_last_step_and_all_after_it_use_the_ratio():
    assert learning_rate_factor(100, steps=100, warmup_steps=10, decay_ratio=0.03) == 0.03
    assert learning_rate_factor(140, steps=100, warmup_steps=10, decay_ratio=0.03) == 0.03
    assert learning_rate_factor(1, steps=1, warmup_steps=0, decay_ratio=0.5) == 0.5
