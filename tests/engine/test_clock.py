"""Calls are charged with the device's time, on a GPU as soon as it is known."""

from dataclasses import dataclass

import pytest

from sdbatch.engine.clock import MOST_AHEAD, Account, DeviceClock


@dataclass
class FakeGpu:
    """A queue of events; the test decides when the device reaches them."""

    time_ms: float = 0.0
    waits: int = 0

    def event(self):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self._gpu = gpu
        self._at = 0.0
        self.reached = False

    def record(self):
        self._at = self._gpu.time_ms

    def query(self):
        return self.reached

    def synchronize(self):
        self._gpu.waits += 1
        self.reached = True

    def elapsed_time(self, end_event):
        return end_event._at - self._at


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def clock(gpu):
    return DeviceClock(gpu.event)


def call(gpu, clock, accounts, milliseconds):
    with clock.charge(accounts):
        gpu.time_ms += milliseconds
    return clock._calls[-1].end


def test_a_cpu_is_charged_when_the_call_returns_even_if_it_raises():
    account, other = Account(), Account()
    with pytest.raises(ZeroDivisionError), DeviceClock(None).charge([account, other]):
        1 / 0  # noqa: B018
    assert account.seconds == other.seconds > 0


def test_a_gpu_is_charged_an_estimate_and_then_the_true_time(gpu, clock):
    account, other = Account(), Account()
    call(gpu, clock, [account], 500.0).reached = True
    assert account.seconds == 0.0  # nothing is known yet
    second = call(gpu, clock, [account], 2000.0)
    assert account.seconds == 0.5  # the first one is measured
    call(gpu, clock, [account], 1000.0)
    assert account.seconds == 1.0  # and the third one is estimated by it
    second.reached = True
    call(gpu, clock, [other, other], 100.0)
    assert account.seconds == 0.5 + 2.0 + 0.5
    assert other.seconds == 0.0


def test_a_call_for_several_accounts_is_shared(gpu, clock):
    small, large = Account(), Account()
    call(gpu, clock, [small, large, large], 3000.0).reached = True
    call(gpu, clock, [Account()], 0.0)
    assert (small.seconds, large.seconds) == (1.0, 2.0)


def test_few_calls_are_queued_on_a_gpu(gpu, clock):
    for _ in range(MOST_AHEAD):
        call(gpu, clock, [Account()], 1.0)
    assert gpu.waits == 0
    call(gpu, clock, [Account()], 1.0)
    assert gpu.waits == 1
    assert len(clock._calls) == MOST_AHEAD
