"""Items over several processes, in order."""

from __future__ import annotations

import os

import pytest

from data.processes import CHUNK, PENDING, ordered_map


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_the_order_of_the_items(num_proc):
    count = CHUNK * PENDING * 2 + 3  # more than are held at once
    assert list(ordered_map(abs, iter(range(-count, 0)), num_proc)) == list(range(count, 0, -1))


def test_a_process_that_was_killed_is_named_with_a_remedy():
    with pytest.raises(ChildProcessError, match="one of 2 processes was killed.*lower --num-proc"):
        list(ordered_map(os._exit, iter([9]), 2))


def test_an_error_of_the_function_comes_through():
    with pytest.raises(ValueError, match="invalid literal"):
        list(ordered_map(int, iter(["1", "two"]), 2))
