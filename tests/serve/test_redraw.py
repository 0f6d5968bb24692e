"""Images whose replica is lost are drawn again; here the replicas are Drawers that fail."""

import asyncio
import json
import logging
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from sdbatch.engine.request import Request
from sdbatch.errors import ModelError
from sdbatch.serve import application, redraw
from sdbatch.serve.drawer import Drawer, DrawRequest, Progress, Version
from sdbatch.serve.redraw import ReplicaDied, ReplicaUnavailable
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.sd1 import build_request
from tests.serve.conftest import ENCODING, metric

REQUEST = DrawRequest(build_request(), ENCODING)
VERSION = Version(settings="", defaults="", model="tiny", model_hash="")


class LosingDrawer(Drawer):
    """Loses the first tries of each image, as replicas do that die; then it draws.

    Each of `losses` is what is raised, and after how many events of a stream.
    """

    losses = ()

    def __init__(self, *args):
        super().__init__(*args)
        self.tries = {}  # by seed

    def _next_loss(self, draw_request):
        seed = draw_request.request.seed
        number = self.tries[seed] = self.tries.get(seed, 0) + 1
        return self.losses[number - 1] if number <= len(self.losses) else (None, 0)

    async def draw(self, draw_request):
        error, _ = self._next_loss(draw_request)
        if error is not None:
            raise error
        return await super().draw(draw_request)

    async def draw_events(self, draw_request):
        error, events_left = self._next_loss(draw_request)
        image = await super().draw(draw_request)
        for event in (
            *(Progress(1, 4), replace(image, preview=True)),
            *(Progress(2, 4), replace(image, preview=True)),
            *(Progress(4, 4), image),
        ):
            if error is not None and events_left == 0:
                raise error
            events_left -= 1
            yield event


@pytest.fixture
def losing(serving):
    """Start a service whose replicas are lost so."""

    def start(*losses, **serve):
        drawer = type("Losing", (LosingDrawer,), {"losses": losses})
        return serving(drawer_type=drawer, serve=serve)

    return start


def died(events=0):
    return ReplicaDied("The actor died."), events


def unavailable(events=0):
    return ReplicaUnavailable("The actor is unavailable."), events


def events_of(server):
    """Return the comments and the events of a stream."""
    body = {"prompt": "a dog", "seed": 5, "stream": True, "partial_images": 2}
    with server.client.stream("POST", "/v1/images/generations", json=body) as stream:
        lines = [line.partition(": ")[2] for line in stream.iter_lines() if "{" in line]
    events = [json.loads(line) for line in lines if "queue_position" not in line]
    return [{**event, "created_at": None} for event in events]


@pytest.mark.parametrize("losses", [[died()], [died(), died()], [unavailable(), died()]])
def test_an_image_of_a_lost_replica_is_drawn_again(losing, serving, monkeypatch, losses):
    monkeypatch.setattr(redraw, "PAUSE_SECONDS", 0.01)
    server = losing(*losses)
    answer = server.post(prompt="a dog", seed=5, n=2)
    assert answer.json()["data"] == serving().post(prompt="a dog", seed=5, n=2).json()["data"]
    assert server.drawer.tries == {5: len(losses) + 1, 6: len(losses) + 1}
    deaths = sum(isinstance(error, ReplicaDied) for error, _ in losses)
    assert metric(server, "sdbatch_images_redrawn_total") == 2 * deaths
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == 2


def test_an_engine_that_cannot_go_on_counts_as_a_dead_replica(losing):
    server = losing((ModelError("The engine stopped."), 0))
    assert server.post(prompt="a dog", seed=5).status_code == 200
    assert server.drawer.tries == {5: 2}


def test_a_long_job_whose_replica_is_lost_completes(losing):
    server = losing(died(3))
    job = server.post("/v1/images/jobs", prompt="a dog", seed=5, n=2).json()
    server.wait_for_pending(0)
    state = server.client.get(job["poll_url"]).json()
    assert (state["status"], [image["seed"] for image in state["result"]["data"]]) == (
        "completed",
        [5, 6],
    )


@pytest.mark.parametrize("events", [0, 2, 3, 5])
def test_a_stream_begins_again_without_sending_a_preview_twice(losing, events):
    once = events_of(losing())
    server = losing(died(events))
    again = events_of(server)
    assert server.drawer.tries == {5: 2}
    assert [event["step"] for event in once if "step" in event] == [1, 2, 4]
    assert [event["step"] for event in again if "step" in event] == [
        *[1, 2, 4][: (events + 1) // 2],
        *[1, 2, 4],
    ]
    assert len(once) == 6
    assert [each for each in again if "step" not in each] == [
        each for each in once if "step" not in each
    ]


def test_an_image_with_which_three_replicas_died_is_not_tried_again(losing):
    server = losing(died(), died(), died())
    answer = server.post(prompt="a dog", seed=5)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert "3 replicas died while they drew this image" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert server.drawer.tries == {5: 3}
    stream = losing(died(1), died(0), died(2))
    assert events_of(stream)[-1]["error"]["code"] == "replica_lost"
    assert stream.drawer.tries == {5: 3}
    stream.wait_for_pending(0)
    assert metric(stream, 'sdbatch_images_total{outcome="failed"}') == 1


def test_a_client_hears_of_it_if_no_replica_comes_back_in_the_time_limit(losing, monkeypatch):
    monkeypatch.setattr(redraw, "PAUSE_SECONDS", 0.01)
    server = losing(*[unavailable()] * 10_000, timeout_s=0.5)
    answer = server.post(prompt="a dog", seed=5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert "No replica came back in the time limit" in answer.json()["error"]["message"]
    [event] = events_of(server)
    assert event["error"]["code"] == "replica_lost"
    server.wait_for_pending(0)


def test_a_failure_of_the_image_itself_is_not_tried_again(losing):
    server = losing()
    assert server.post(prompt="fail", seed=5).status_code == 400
    assert server.drawer.tries == {5: 1}


def test_an_internal_error_of_a_drawer_is_not_tried_again(losing):
    server = losing((RuntimeError("a bug"), 0))
    assert server.post(prompt="a dog", seed=5).json()["error"]["code"] == "internal"
    assert server.drawer.tries == {5: 1}


class Answer:
    """What a call through Ray Serve returns: here it ends with an error."""

    def __init__(self, error):
        self._error = error
        self.cancelled = False

    def __await__(self):
        yield
        raise self._error

    async def __aiter__(self):
        raise self._error
        yield

    def cancel(self):
        self.cancelled = True


class Handle:
    """A handle of Ray Serve whose calls all end with one error."""

    def __init__(self, error):
        self._error = error
        self.draw = self.draw_events = self

    def options(self, **_):
        return self

    def remote(self, *_):
        return Answer(self._error)


def error_of_a_call(error):
    """Return the exception that Replicas raise for an error of Ray, of both kinds of calls."""
    replicas = application.Replicas(Handle(error), VERSION)

    async def stream():
        return [event async for event in replicas.draw_events(REQUEST)]

    async def errors():
        tasks = [asyncio.ensure_future(replicas.draw(REQUEST)), asyncio.ensure_future(stream())]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second = asyncio.run(errors())
    assert type(first) is type(second)
    return first


def task_error(cause):
    return RayTaskError("draw", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ActorDiedError(), ReplicaDied),
        (NodeDiedError("gone"), ReplicaDied),
        (task_error(ModelError("The engine stopped.")), ReplicaDied),
        (ActorUnavailableError("draining", None), ReplicaUnavailable),
        (BackPressureError(1, 1), ReplicaUnavailable),
        (asyncio.CancelledError(), ReplicaUnavailable),  # by the replica, not by the caller
        (task_error(ValueError("a bug")), ValueError),
    ],
)
def test_errors_of_ray_say_whether_a_replica_died_or_is_unavailable(error, meaning):
    assert isinstance(error_of_a_call(error), meaning)


def test_a_call_that_its_caller_cancels_is_cancelled_in_ray_too():
    class Endless(Answer):
        def __await__(self):
            return asyncio.sleep(3600).__await__()

    async def cancel():
        answer, handle = Endless(None), Handle(None)
        handle.remote = lambda *_: answer
        drawing = asyncio.ensure_future(application.Replicas(handle, VERSION).draw(REQUEST))
        await asyncio.sleep(0)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        return answer.cancelled

    assert asyncio.run(cancel())


def test_a_replica_ends_its_process_when_its_engine_cannot_go_on(monkeypatch, caplog):
    class Ended(BaseException):
        pass

    class Broken(FakeEngine):
        def submit(self, request, *, exact=True, follow=None):
            raise ModelError("The engine stopped after an internal error.")

    def exit_process(code):
        raise Ended(code)

    monkeypatch.setattr(application.os, "_exit", exit_process)
    drawer = application.ReplicaDrawer(Broken, SafetyPolicy("flag"))
    with caplog.at_level(logging.ERROR), pytest.raises(Ended, match="1"):
        asyncio.run(drawer.draw(DrawRequest(Request(prompt="a"), ENCODING)))
    assert "its replica ends: The engine stopped" in caplog.text
