"""Long jobs: their progress, result, cancellation and failure."""

import threading
from contextlib import aclosing

from sdbatch.serve.drawer import Drawer
from tests.serve.conftest import SECONDS, PausedEngine


class WatchedDrawer(Drawer):
    """Counts the events that the service has handled."""

    def __init__(self, *args):
        super().__init__(*args)
        self.handled = threading.Semaphore(0)

    async def draw_events(self, draw_request):
        async with aclosing(super().draw_events(draw_request)) as events:
            async for event in events:
                yield event
                self.handled.release()


def test_a_long_job_reports_its_queue_position_its_progress_and_its_result(serving):
    engine = PausedEngine()
    server = serving(engine, drawer_type=WatchedDrawer)
    first = server.post("/v1/images/jobs", prompt="a", n=2, seed=5)
    assert first.status_code == 202
    assert first.headers["location"] == first.json()["poll_url"]
    second = server.post("/v1/images/jobs", prompt="b", response_format="url").json()
    assert (second["status"], second["queue_position"], second["progress"]) == ("queued", 2, 0.0)
    engine.wait_for(waiting=3)
    [(_, _, follow), *_] = engine.waiting
    follow.step(1, 4)
    assert server.drawer.handled.acquire(timeout=SECONDS)
    state = server.client.get(first.headers["location"]).json()
    assert (state["status"], state["progress"], state["queue_position"]) == ("drawing", 0.125, 0)
    engine.draw_all()
    server.wait_for_pending(0)
    state = server.client.get(first.headers["location"]).json()
    assert (state["status"], state["queue_position"], state["progress"]) == ("completed", None, 1.0)
    assert [image["seed"] for image in state["result"]["data"]] == [5, 6]
    [stored] = server.service.stored_images.files
    assert server.client.get(f"/v1/images/files/{stored}").status_code == 200  # before any poll
    polls = [server.client.get(second["poll_url"]).json() for _ in range(2)]
    assert polls[0] == polls[1]
    url = polls[0]["result"]["data"][0]["url"]
    assert url == f"{server.url}/v1/images/files/{stored}"
    assert server.client.get(url).status_code == 200


def test_a_long_job_can_be_cancelled_once(serving):
    engine = PausedEngine()
    server = serving(engine)
    job = server.post("/v1/images/jobs", prompt="a", n=2).json()
    engine.wait_for(waiting=2)
    state = server.post(f"/v1/images/jobs/{job['id']}/cancel").json()
    assert (state["status"], state["result"]) == ("cancelled", None)
    assert engine.cancelled == 2
    assert server.service.queue.pending == 0
    again = server.post(f"/v1/images/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")


def test_a_long_job_that_fails_has_the_reason(serving):
    server = serving()
    job = server.post("/v1/images/jobs", prompt="fail").json()
    server.wait_for_pending(0)
    state = server.client.get(job["poll_url"]).json()
    assert state["status"] == "failed"
    assert state["error"]["message"] == "this prompt cannot be drawn."
    assert state["error"]["param"] is None


def test_an_unknown_job_or_image_is_not_found(server):
    for path in ("/v1/images/jobs/x", "/v1/images/files/x.png"):
        answer = server.client.get(path)
        assert answer.status_code == 404
        assert "no longer" in answer.json()["error"]["message"]
