"""submit, cancel and close from many threads at once: every future ends, once, and rightly."""

import queue
import random
import threading
from collections import Counter

import pytest

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError

THREADS = 8
ENDS = 60  # requests that end in an engine before it is closed, about


class Client:
    """One thread: submits, cancels some, and checks how each ended."""

    def __init__(self, seed, engines, expected, stop):
        self.random = random.Random(seed)
        self.engines = engines  # the one in use is the last
        self.expected = expected  # request -> image's bytes
        self.stop = stop
        self.checks = threading.Semaphore(0)
        self.ended = Counter()
        self.wrong = []

    def run(self):
        open_ = []
        while not self.stop.is_set():
            request = self.random.choice(list(self.expected))
            try:
                future = self.engines[-1].submit(request)
            except ModelError:  # closed just now: another is there
                self.ended["refused"] += 1
                continue
            calls = queue.SimpleQueue()
            future.add_done_callback(calls.put)
            open_.append((request, future, calls))
            if self.random.random() < 0.4:
                self.random.choice(open_)[1].cancel()
            if len(open_) > 12:
                self.check(*open_.pop(self.random.randrange(len(open_))))
        for each in open_:
            self.check(*each)

    def check(self, request, future, calls):
        error = None
        try:
            image = future.result(timeout=60).image
        except BaseException as raised:  # noqa: BLE001  CancelledError is one of these
            error = type(raised).__name__
        else:
            if image.tobytes() != self.expected[request]:
                self.wrong.append(request)
        self.ended[error or "drawn"] += 1
        try:
            calls.get(timeout=5)  # result() may return just before the callbacks are called
        except queue.Empty:
            self.wrong.append((request, "no callback"))
        if not calls.empty() or error not in (None, "CancelledError"):
            self.wrong.append((request, error))
        self.checks.release()


@pytest.mark.parametrize("closes", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_no_result_is_lost_or_doubled_while_threads_submit_cancel_and_close(family, kind, closes):
    several = ("euler_a", "dpmpp_2m", "ddim", "heun")
    samplers = [name for name in several if name in kind.samplers] or kind.samplers
    requests = [
        Request(
            prompt=f"dog {i % 3}",
            seed=i,
            sampler=samplers[i % len(samplers)],
            num_inference_steps=2 + i % 5,
            guidance_scale=(1.0, 7.5)[i % 2],
            height=(16, 24)[i % 3 == 0],
            width=16,
        )
        for i in range(24)
    ]
    first = Engine(family, lanes=6, threads=1)
    expected = {request: first.submit(request).result().image.tobytes() for request in requests}
    engines, stop = [first], threading.Event()
    clients = [Client(seed, engines, expected, stop) for seed in range(THREADS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    closing = random.Random(99)
    for _ in range(closes):
        for client in clients:
            for _ in range(closing.randrange(2 * ENDS // THREADS)):
                client.checks.acquire()
        engines.append(Engine(family, lanes=6, threads=1))
        engines[-2].close(cancel=closing.random() < 0.5)
    stop.set()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    engines[-1].close()
    ended = sum((client.ended for client in clients), Counter())
    assert [client.wrong for client in clients] == [[]] * THREADS
    assert set(ended) <= {"drawn", "CancelledError", "refused"}
    assert min(ended["drawn"], ended["CancelledError"]) > 10 * closes, ended
