"""The queue, the time limit, streams and the shutdown, with fake engines."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sdbatch.engine.request import Drawn
from sdbatch.errors import ModelError
from sdbatch.serve.drawer import Drawer
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.serve.conftest import SECONDS, PausedEngine, metric


@pytest.fixture
def client_threads():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_requests_that_the_queue_cannot_hold_are_rejected_and_the_others_drawn(
    serving, client_threads
):
    engine = PausedEngine()
    server = serving(engine, serve={"queue": 5})
    waiting = [client_threads.submit(server.post, prompt="a", n=2) for _ in range(2)]
    server.wait_for_pending(4)
    rejected = server.post(prompt="a", n=2)
    assert rejected.status_code == 503
    assert rejected.json()["error"]["code"] == "overloaded"
    assert "The queue is full: 4 images wait." in rejected.json()["error"]["message"]
    assert int(rejected.headers["retry-after"]) >= 1
    last = client_threads.submit(server.post, prompt="a", n=1)
    server.wait_for_pending(5)
    engine.wait_for(waiting=5)
    engine.draw_all()
    assert [each.result().status_code for each in [*waiting, last]] == [200, 200, 200]
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == 5
    assert metric(server, 'sdbatch_images_total{outcome="refused"}') == 2
    assert metric(server, "sdbatch_images_open") == 0


def test_overload_loses_no_accepted_request(serving, client_threads):
    overloaded = threading.Event()

    class DrawsOnceOverloaded(FakeEngine):
        def _draw(self, request):
            assert overloaded.wait(SECONDS)
            return super()._draw(request)

    server = serving(DrawsOnceOverloaded(delay=0.03), serve={"queue": 8})

    def post(seed):
        answer = server.post(prompt="a", seed=seed)
        if answer.status_code == 503:
            overloaded.set()
        return answer

    answers = list(client_threads.map(post, range(200)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    drawn = [answer.json()["data"][0]["seed"] for answer in answers if answer.status_code == 200]
    assert drawn == [i for i, status in enumerate(statuses) if status == 200]
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == len(drawn)


def test_a_request_that_takes_too_long_ends_and_its_lanes_are_released(serving):
    engine = PausedEngine()
    server = serving(engine, serve={"timeout_s": 1.0})
    answer = server.post(prompt="a", n=3)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    engine.wait_for(waiting=3, cancelled=3)
    assert len(engine.waiting) == 3
    server.wait_for_pending(0)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        assert '"code": "timeout"' in stream.read().decode()
    server.wait_for_pending(0)


def test_an_image_that_fails_ends_its_request_and_cancels_the_others(serving):
    class FailsOnSeed1(PausedEngine):
        def submit(self, request, *, exact=True, follow=None):
            if request.seed == 1:
                failed: Future[Drawn] = Future()
                failed.set_exception(ArithmeticError("latents = not finite"))
                return failed
            return super().submit(request, exact=exact, follow=follow)

    engine = FailsOnSeed1()
    server = serving(engine)
    answer = server.post(prompt="a", seed=0, n=3)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "ArithmeticError: latents = not finite."
    engine.wait_for(cancelled=2)


def test_an_engine_that_cannot_go_on_is_an_error_that_the_client_can_retry(serving):
    class Broken(FakeEngine):
        def submit(self, request, *, exact=True, follow=None):
            raise ModelError("engine = closed: takes no more requests.")

    server = serving(Broken())
    answer = server.post(prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    body = {"prompt": "a", "stream": True}
    with server.client.stream("POST", "/v1/images/generations", json=body) as stream:
        assert '"code": "replica_lost"' in stream.read().decode()
    job = server.post("/v1/images/jobs", prompt="a").json()
    server.wait_for_pending(0)
    state = server.client.get(job["poll_url"]).json()
    assert (state["status"], state["error"]["code"]) == ("failed", "replica_lost")
    assert metric(server, 'sdbatch_images_total{outcome="failed"}') == 3


def test_an_internal_error_is_one_in_streams_and_long_jobs_too(serving):
    class Faulty(Drawer):
        async def draw(self, draw_request):
            raise RuntimeError("a bug")

        async def draw_events(self, draw_request):
            raise RuntimeError("a bug")
            yield

    server = serving(drawer_type=Faulty)
    answer = server.post(prompt="a")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    body = {"prompt": "a", "stream": True}
    with server.client.stream("POST", "/v1/images/generations", json=body) as stream:
        assert '"code": "internal"' in stream.read().decode()
    job = server.post("/v1/images/jobs", prompt="a").json()
    server.wait_for_pending(0)
    state = server.client.get(job["poll_url"]).json()
    assert (state["status"], state["error"]["code"]) == ("failed", "internal")


def test_readiness_depends_on_the_engine(serving):
    engine = FakeEngine()
    server = serving(engine)
    assert server.client.get("/readyz").status_code == 200
    engine.stalled_seconds = 601.0
    answer = server.client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert server.client.get("/healthz").status_code == 200
    with pytest.raises(RuntimeError, match="no progress for 601 s"):
        asyncio.run(Drawer(lambda: engine, SafetyPolicy("flag")).check_health())


def test_more_images_than_the_queue_can_ever_hold_are_rejected_without_retry(serving):
    answer = serving(serve={"queue": 4}).post(prompt="a", n=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "n = 5: must be 4 at most, the length of the queue."
    )


def test_a_busy_service_is_ready(serving):
    """A health check would wait behind the images: a replica limits its concurrent calls."""
    engine = FakeEngine()
    server = serving(engine)
    server.post(prompt="a")
    engine.stalled_seconds = 601.0
    assert server.client.get("/readyz").status_code == 200  # it drew a moment ago


def test_shutdown_draws_accepted_requests_and_accepts_no_more(serving, client_threads):
    engine = PausedEngine()
    server = serving(engine)
    waiting = client_threads.submit(server.post, prompt="a")
    server.wait_for_pending(1)
    drained = server.drain(SECONDS)
    assert server.client.get("/readyz").status_code == 503
    rejected = server.post(prompt="a")
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "stopping")
    assert not drained.done()
    engine.wait_for(waiting=1)
    engine.draw_all()
    assert waiting.result().status_code == 200
    assert drained.result(SECONDS) == 0


def test_shutdown_ends_in_time_and_returns_how_many_images_are_left(serving, client_threads):
    engine = PausedEngine()
    server = serving(engine)
    waiting = client_threads.submit(server.post, prompt="a", n=2)
    server.wait_for_pending(2)
    assert server.drain(0.1).result(SECONDS) == 2
    engine.wait_for(waiting=2)
    engine.draw_all()
    waiting.result()


def test_lanes_of_a_stream_are_released_when_its_client_disconnects(serving):
    engine = PausedEngine()
    server = serving(engine)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        assert stream.status_code == 200
        server.wait_for_pending(1)
    server.wait_for_pending(0)
    engine.wait_for(cancelled=1)


def test_a_stream_reports_its_queue_position(serving, client_threads):
    engine = PausedEngine()
    server = serving(engine)
    waiting = client_threads.submit(server.post, prompt="a", n=3)
    server.wait_for_pending(3)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        first = next(line for line in stream.iter_lines() if line)
    assert first == ': {"queue_position": 3}'
    engine.wait_for(waiting=3)
    engine.draw_all()
    waiting.result()


def test_a_stream_reports_its_steps_and_is_neither_cached_nor_buffered(serving):
    engine = PausedEngine()
    server = serving(engine)
    with server.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
    ) as stream:
        engine.wait_for(waiting=1)
        [(_, _, follow)] = engine.waiting
        follow.step(3, 4)
        lines = (line for line in stream.iter_lines() if line and "queue_position" not in line)
        assert next(lines) == ': {"step": 3, "steps": 4}'
        engine.draw_all()
        assert next(lines) == "event: image_generation.completed"
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-store"
    assert stream.headers["x-accel-buffering"] == "no"


def test_reservations_are_released_however_their_requests_end(serving, client_threads):
    server = serving(FakeEngine(delay=0.01), serve={"queue": 4})

    def disconnect(_):
        with server.client.stream(
            "POST", "/v1/images/generations", json={"prompt": "a", "stream": True}
        ) as stream:
            return stream.status_code

    statuses = set(client_threads.map(disconnect, range(100)))
    assert 200 in statuses
    assert statuses <= {200, 503}
    server.wait_for_pending(0)
    assert server.post(prompt="a", n=4).status_code == 200
