"""The queue, the time limit, streams, stopping; with the fake engine, as slow as it is told."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sdbatch.engine.request import Drawn
from sdbatch.errors import ModelError
from sdbatch.serve.drawer import Drawer
from tests.fakes import FakeEngine
from tests.serve.conftest import Held, eventually, metric


@pytest.fixture
def at_once():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_what_the_queue_cannot_hold_is_refused_and_what_it_holds_is_drawn(serving, at_once):
    engine = Held()
    server = serving(engine, serve={"queue": 5})
    held = [at_once.submit(server.post, prompt="a", n=2) for _ in range(2)]
    server.open_soon(4)
    refused = server.post(prompt="a", n=2)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert "4 images wait of 5 that may" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    last = at_once.submit(server.post, prompt="a", n=1)
    server.open_soon(5)
    eventually(lambda: len(engine.waiting) == 5)
    engine.go()
    assert [one.result().status_code for one in [*held, last]] == [200, 200, 200]
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == 5
    assert metric(server, 'sdbatch_images_total{outcome="refused"}') == 2
    assert metric(server, "sdbatch_images_open") == 0


def test_overload_loses_nothing_that_was_taken_in(serving, at_once):
    server = serving(FakeEngine(delay=0.03), serve={"queue": 8})
    answers = list(at_once.map(lambda i: server.post(prompt="a", seed=i), range(200)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    drawn = [answer.json()["data"][0]["seed"] for answer in answers if answer.status_code == 200]
    assert drawn == [i for i, status in enumerate(statuses) if status == 200]
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == len(drawn)


def test_a_request_that_takes_too_long_is_given_up_and_its_lanes_freed(serving):
    engine = Held()
    server = serving(engine, serve={"timeout_s": 1.0})
    answer = server.post(prompt="a", n=3)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    eventually(lambda: engine.cancelled == len(engine.waiting) == 3)
    server.open_soon(0)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        assert '"code": "timeout"' in stream.read().decode()
    server.open_soon(0)


def test_one_image_that_fails_ends_its_request_and_cancels_the_others(serving):
    class Second(Held):
        def submit(self, request, *, exact=True, follow=None):
            if request.seed == 1:
                failed: Future[Drawn] = Future()
                failed.set_exception(ArithmeticError("latents = not finite"))
                return failed
            return super().submit(request, exact=exact, follow=follow)

    engine = Second()
    server = serving(engine)
    answer = server.post(prompt="a", seed=0, n=3)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "ArithmeticError: latents = not finite."
    eventually(lambda: engine.cancelled == 2)


def test_an_engine_that_cannot_go_on_is_a_fault_of_the_service(serving):
    class Broken(FakeEngine):
        def submit(self, request, *, exact=True, follow=None):
            raise ModelError("engine = closed: takes no more requests.")

    server = serving(Broken())
    answer = server.post(prompt="a")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    asked = {"prompt": "a", "stream": True}
    with server.client.stream("POST", "/v1/images/generations", json=asked) as stream:
        assert '"code": "internal"' in stream.read().decode()
    job = server.post("/v1/images/jobs", prompt="a").json()
    server.open_soon(0)
    state = server.client.get(job["poll_url"]).json()
    assert (state["status"], state["error"]["code"]) == ("failed", "internal")
    assert metric(server, 'sdbatch_images_total{outcome="failed"}') == 3


def test_readiness_looks_at_the_engine(serving):
    engine = FakeEngine()
    server = serving(engine)
    assert server.client.get("/readyz").status_code == 200
    engine.stalled_seconds = 601.0
    answer = server.client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert server.client.get("/healthz").status_code == 200
    with pytest.raises(RuntimeError, match="engine = still for 601 s"):
        asyncio.run(Drawer(lambda: engine, "flag").check_health())


def test_more_images_than_the_queue_holds_are_refused_for_good(serving):
    answer = serving(serve={"queue": 4}).post(prompt="a", n=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "n = 5: the queue holds 4."


def test_a_busy_service_is_ready(serving):
    """The question would wait behind the images, as a replica takes so many calls at a time."""
    engine = FakeEngine()
    server = serving(engine)
    server.post(prompt="a")
    engine.stalled_seconds = 601.0
    assert server.client.get("/readyz").status_code == 200  # it drew a moment ago


def test_stopping_draws_what_was_taken_in_and_takes_in_nothing_more(serving, at_once):
    engine = Held()
    server = serving(engine)
    held = at_once.submit(server.post, prompt="a")
    server.open_soon(1)
    drained = at_once.submit(asyncio.run, server.service.drain(20))
    while server.client.get("/readyz").status_code == 200:
        time.sleep(0.01)
    refused = server.post(prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    assert not drained.done()
    eventually(lambda: engine.waiting)
    engine.go()
    assert held.result().status_code == 200
    assert drained.result() == 0


def test_stopping_gives_up_in_time_and_says_what_is_left(serving, at_once):
    engine = Held()
    server = serving(engine)
    held = at_once.submit(server.post, prompt="a", n=2)
    server.open_soon(2)
    assert asyncio.run(server.service.drain(0.1)) == 2
    eventually(lambda: len(engine.waiting) == 2)
    engine.go()
    held.result()


def test_a_stream_whose_client_hangs_up_frees_its_lanes(serving):
    engine = Held()
    server = serving(engine)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        assert stream.status_code == 200
        server.open_soon(1)
    server.open_soon(0)
    eventually(lambda: engine.cancelled == 1)


def test_a_stream_says_how_many_are_before_it(serving, at_once):
    engine = Held()
    server = serving(engine)
    held = at_once.submit(server.post, prompt="a", n=3)
    server.open_soon(3)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        first = next(line for line in stream.iter_lines() if line)
    assert first == ': {"queue_position": 3}'
    eventually(lambda: len(engine.waiting) >= 3)
    engine.go()
    held.result()


def test_places_of_requests_are_given_back_whatever_ends_them(serving):
    server = serving(FakeEngine(delay=0.01), serve={"queue": 4})
    stop = threading.Event()

    def hang_up_often():
        while not stop.is_set():
            with server.client.stream(
                "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
            ):
                pass

    threads = [threading.Thread(target=hang_up_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    server.open_soon(0)
    assert server.post(prompt="a", n=4).status_code == 200
