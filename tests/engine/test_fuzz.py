"""submit, cancel and close from many threads at once: every future ends, once, and rightly."""

import os
import random
import threading
import time
from collections import Counter

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError

THREADS = 8
SECONDS = float(os.environ.get("SDBATCH_FUZZ_SECONDS", "30"))  # a family


class Client:
    """One thread: submits, cancels some, and checks how each ended."""

    def __init__(self, seed, engines, expected):
        self.random = random.Random(seed)
        self.engines = engines  # the one in use is the last
        self.expected = expected  # request -> image's bytes
        self.calls = Counter()  # future -> how often its callback was called
        self.ended = Counter()
        self.wrong = []

    def run(self, end):
        open_ = []
        while time.monotonic() < end:
            request = self.random.choice(list(self.expected))
            try:
                future = self.engines[-1].submit(request)
            except ModelError:  # closed just now: another is coming
                self.ended["refused"] += 1
                time.sleep(0.001)
                continue
            future.add_done_callback(lambda f: self.calls.update([id(f)]))
            open_.append((request, future))
            if self.random.random() < 0.2:
                self.random.choice(open_)[1].cancel()
            if len(open_) > 12:
                self.check(*open_.pop(self.random.randrange(len(open_))))
        for request, future in open_:
            self.check(request, future)

    def check(self, request, future):
        future_error = None
        try:
            image = future.result(timeout=60).image
        except BaseException as error:  # noqa: BLE001  CancelledError is one of these
            future_error = type(error).__name__
            self.ended[future_error] += 1
        else:
            self.ended["drawn"] += 1
            if image.tobytes() != self.expected[request]:
                self.wrong.append(request)
        deadline = time.monotonic() + 5
        while not self.calls[id(future)] and time.monotonic() < deadline:
            time.sleep(0.001)  # result() may return just before the callbacks are called
        if self.calls.pop(id(future)) != 1 or future_error not in (None, "CancelledError"):
            self.wrong.append((request, future_error))


def test_no_result_is_lost_or_doubled_while_threads_submit_cancel_and_close(family, kind):
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
    engines = [first]
    clients = [Client(seed, engines, expected) for seed in range(THREADS)]
    end = time.monotonic() + SECONDS
    threads = [threading.Thread(target=client.run, args=(end,)) for client in clients]
    for thread in threads:
        thread.start()
    closing = random.Random(99)
    while time.monotonic() < end:
        time.sleep(closing.uniform(0.2, 1.0))
        engines.append(Engine(family, lanes=6, threads=1))
        engines[-2].close(cancel=closing.random() < 0.5)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    engines[-1].close()
    ended = sum((client.ended for client in clients), Counter())
    assert [client.wrong for client in clients] == [[]] * THREADS
    assert set(ended) <= {"drawn", "CancelledError", "refused"}
    assert min(ended["drawn"], ended["CancelledError"]) > 10 * SECONDS, ended
