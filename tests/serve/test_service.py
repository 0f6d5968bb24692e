"""The queue, the time limit, long jobs, stopping; with the fake engine, as slow as it is told."""

import asyncio
import base64
import io
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sdbatch.engine.request import Drawn
from sdbatch.errors import ModelError
from sdbatch.serve.drawer import Drawer
from sdbatch.serve.kept import Kept
from tests.fakes import FakeEngine


class Held(FakeEngine):
    """Draws when it is let go; remembers which of its images were cancelled."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def submit(self, request, *, exact=True, follow=None):
        future: Future[Drawn] = Future()
        self.waiting.append((future, request, follow))
        return future

    def go(self):
        waiting, self.waiting = self.waiting, []
        for future, request, _ in waiting:
            if not future.cancelled():
                future.set_result(self._draw(request))

    @property
    def cancelled(self):
        return sum(future.cancelled() for future, _, _ in self.waiting)


@pytest.fixture
def at_once():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def eventually(holds):
    """Wait until it holds, which the service's own thread brings about."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


def metric(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)))


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


def test_a_long_job_is_told_its_place_and_then_what_came_of_it(serving):
    engine = Held()
    server = serving(engine)
    first = server.post("/v1/images/jobs", prompt="a", n=2, seed=5)
    assert first.status_code == 202
    assert first.headers["location"] == first.json()["poll_url"]
    second = server.post("/v1/images/jobs", prompt="b", response_format="url").json()
    assert (second["status"], second["queue_position"], second["progress"]) == ("queued", 2, 0.0)
    eventually(lambda: len(engine.waiting) == 3)
    [(_, _, follow), *_] = engine.waiting
    follow.step(1, 4)
    while (state := server.client.get(first.headers["location"]).json())["status"] == "queued":
        time.sleep(0.01)
    assert (state["status"], state["progress"], state["queue_position"]) == ("drawing", 0.125, 0)
    engine.go()
    server.open_soon(0)
    state = server.client.get(first.headers["location"]).json()
    assert (state["status"], state["queue_position"], state["progress"]) == ("completed", None, 1.0)
    assert [image["seed"] for image in state["result"]["data"]] == [5, 6]
    urls = {server.client.get(second["poll_url"]).json()["result"]["data"][0]["url"] for _ in "12"}
    assert len(urls) == 1  # asked twice, kept once
    assert server.client.get(urls.pop()).status_code == 200


def test_a_long_job_can_be_cancelled_once(serving):
    engine = Held()
    server = serving(engine)
    job = server.post("/v1/images/jobs", prompt="a", n=2).json()
    eventually(lambda: len(engine.waiting) == 2)
    state = server.post(f"/v1/images/jobs/{job['id']}/cancel").json()
    assert (state["status"], state["result"]) == ("cancelled", None)
    assert engine.cancelled == 2
    assert server.service.open == 0
    again = server.post(f"/v1/images/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")


def test_a_long_job_that_fails_says_why(serving):
    server = serving()
    job = server.post("/v1/images/jobs", prompt="fail").json()
    server.open_soon(0)
    state = server.client.get(job["poll_url"]).json()
    assert state["status"] == "failed"
    assert state["error"]["message"] == "this prompt cannot be drawn."
    assert state["error"]["param"] is None


def test_more_images_than_the_queue_holds_are_refused_for_good(serving):
    answer = serving(serve={"queue": 4}).post(prompt="a", n=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "n = 5: the queue holds 4."


def test_a_busy_service_is_ready(serving, at_once):
    """The question would wait behind the images, as a replica takes so many calls at a time."""
    engine = FakeEngine()
    server = serving(engine)
    server.post(prompt="a")
    engine.stalled_seconds = 601.0
    assert server.client.get("/readyz").status_code == 200  # it drew a moment ago


def test_a_job_or_image_that_is_not_there_is_not_found(server):
    for path in ("/v1/images/jobs/x", "/v1/images/files/x.png"):
        answer = server.client.get(path)
        assert answer.status_code == 404
        assert "no longer" in answer.json()["error"]["message"]


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


class Nude(FakeEngine):
    """Draws what the safety checker flags."""

    def _draw(self, request):
        drawn = super()._draw(request)
        return Drawn(
            image=np.full_like(drawn.image, 200),
            prompt_tokens=1,
            prompt_truncated=False,
            lanes=2,
            nsfw=True,
            nsfw_scores=(-0.1, 0.05),
        )


def test_safety_policy_flags(serving):
    image = serving(Nude(), "flag").post(prompt="a").json()["data"][0]
    assert (image["nsfw"], image["nsfw_scores"]) == (True, [-0.1, 0.05])


@pytest.mark.parametrize("previews", [0, 2])
def test_safety_policy_blanks_the_image_and_its_previews(serving, previews):
    server = serving(Nude(), "blank")
    asked = {"prompt": "a", "stream": True, "partial_images": previews, "num_inference_steps": 6}
    with server.client.stream("POST", "/v1/images/generations", json=asked) as stream:
        sent = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    files = [base64.b64decode(json.loads(line)["b64_json"]) for line in sent]
    assert len(files) == previews + 1
    assert not any(np.asarray(Image.open(io.BytesIO(file))).any() for file in files)


def test_safety_policy_drops_with_openais_code(serving):
    answer = serving(Nude(), "drop").post(prompt="a")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "content_policy_violation"
    assert "nsfw by 0.050: dropped, as safety.policy says" in error["message"]


def test_images_are_kept_for_a_while_and_up_to_some_bytes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = Kept(60, 100)
    first, second, third = (kept.put(f"{i}", 40) for i in range(3))
    assert [kept.get(name) for name in (first, second, third)] == [None, "1", "2"]
    running = kept.put("running", 0)
    fourth = kept.put("4", 90)
    assert [kept.get(name) for name in (third, running, fourth)] == [None, "running", "4"]
    now[0] = 61.0
    assert [kept.get(name) for name in (running, fourth)] == [None, None]
    large = kept.put("large", 1000)
    assert kept.get(large) == "large"  # what has just come is kept, whatever its size


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
