"""Learning-rate schedule against the official one."""

from __future__ import annotations

import pytest
from conftest import golden_names, load_golden_json

from pixelllm.training.schedule import learning_rate


@pytest.mark.parametrize("name", golden_names("learning_rate_schedule"))
def test_golden_learning_rate_schedule(name):
    index = load_golden_json("index.json")["cases"][name]
    atol, rtol = index["tolerance"]["atol"], index["tolerance"]["rtol"]
    for schedule in load_golden_json(index["file"])["schedules"]:
        config = schedule["config"]
        base, total = config["base_learning_rate"], config["steps_per_cycle"]
        for value in schedule["values"]:
            rate = learning_rate(value["step"], base, config["warmup_steps"], total)
            expected = value["learning_rate"]
            assert abs(rate - expected) <= atol + rtol * abs(expected), (config, value)


def test_rate_is_zero_at_the_start_of_a_warmup_and_full_at_its_end():
    assert learning_rate(0, 3e-4, warmup=10, total=100) == 0
    assert learning_rate(10, 3e-4, warmup=10, total=100) == pytest.approx(3e-4)
    assert learning_rate(55, 3e-4, warmup=10, total=100) == pytest.approx(1.5e-4)


@pytest.mark.parametrize("total", [50, 99, 100])
def test_a_run_that_ends_within_its_warmup_only_warms_up(total):
    rates = [learning_rate(step, 1.0, warmup=100, total=total) for step in range(total)]
    assert rates == pytest.approx([step / 100 for step in range(total)])
