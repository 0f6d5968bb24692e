"""A call in another process."""

import os

import pytest

from sdbatch.tune import processes
from sdbatch.tune.processes import CallError


def test_a_call_returns_from_another_process_what_it_returns():
    assert processes.call(os.path.join, "a", "b", seconds=60) == "a/b"
    assert processes.call(os.getpid, seconds=60) != os.getpid()


def test_a_call_that_raises_says_what_in_one_line():
    with pytest.raises(CallError, match=r"^ValueError: invalid literal for int"):
        processes.call(int, "a\nb", seconds=60)


def test_a_call_whose_process_dies_is_an_error():
    with pytest.raises(CallError, match=r"^its process died$"):
        processes.call(os._exit, 3, seconds=60)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_call_that_takes_too_long_is_ended(seconds):
    with pytest.raises(CallError, match=r"not done within .* s; --seconds gives more time"):
        processes.call(os.getpid, seconds=seconds)
