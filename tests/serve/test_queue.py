"""The queue is shared by the keys: how much each may have in it, and whose image is next."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdbatch.job import Limits, Serve
from sdbatch.serve.access import ApiKey
from sdbatch.serve.errors import ApiError
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.queue import MAX_PICTURE_BYTES, ImageQueue
from sdbatch.serve.turns import Turns
from tests.fakes import FakeEngine
from tests.serve.conftest import SECONDS, PausedEngine, metric

KEYS = {name: f"{name}-" + "0" * 16 for name in ("alice", "bob")}
FOREVER = float("inf")


@pytest.fixture
def client_threads():
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def shared(serving, write):
    """Start a service with two keys."""

    def start(engine, **serve):
        lines = "".join(f"{name}: {key}\n" for name, key in KEYS.items())
        server = serving(engine, serve={"keys": write("keys.yaml", lines), **serve})
        server.client.headers["Authorization"] = f"Bearer {KEYS['alice']}"
        return server

    return start


def ask(server, key, **body):
    return server.client.post(
        "/v1/images/generations",
        json={"prompt": "a dog", **body},
        headers={"Authorization": f"Bearer {KEYS[key]}"},
    )


class ImageRequests:
    """What the queue reads of a request."""

    def __init__(self, images=1, pictures_size=0):
        self.draw_requests = (None,) * images
        self.pictures_size = pictures_size


def queue_of(images):
    return ImageQueue(Serve(queue=images), Metrics())


def key_of(name, **values):
    return ApiKey(name, Limits(), **values)


def fill(queue, key):
    """Reserve single images until one is refused; return the reservations and the refusal."""
    reservations = []
    while True:
        try:
            reservations.append(queue.reserve(ImageRequests(), key))
        except ApiError as error:
            return reservations, error


def test_a_key_may_have_as_many_images_as_are_free():
    queue = queue_of(8)
    held, refusals = [], []
    for name in ("a", "b", "c", "d", "e"):
        reservations, refusal = fill(queue, key_of(name))
        held.append(reservations)
        refusals.append((refusal.status, refusal.body["error"]["code"]))
    assert [len(each) for each in held] == [4, 2, 1, 1, 0]
    assert refusals == [(429, "queue_share")] * 3 + [(503, "overloaded")] * 2
    for reservation in held[0]:
        reservation.close()
    held += [fill(queue, key_of(name))[0] for name in ("f", "b")]
    assert [len(each) for each in held[-2:]] == [2, 0]


def test_the_only_key_may_fill_the_queue():
    queue = queue_of(8)
    held, refusal = fill(queue, key_of("a", is_only=True))
    assert (len(held), refusal.status) == (8, 503)


@pytest.mark.parametrize(("images", "most"), [(1, 1), (4, 2), (5, 3), (8, 4)])
def test_one_request_takes_no_more_than_as_many_requests_of_one_image(images, most):
    queue = queue_of(images)
    with queue.reserve(ImageRequests(most), key_of("a")):
        assert fill(queue, key_of("a"))[0] == []
    with pytest.raises(ApiError, match=f"n = {most + 1}: must be {most} at most, .*share of a key"):
        queue.reserve(ImageRequests(most + 1), key_of("a"))


def test_a_request_for_more_images_than_are_left_to_its_key_can_be_sent_again():
    queue = queue_of(8)
    held = [
        queue.reserve(ImageRequests(3), key_of("a")),
        queue.reserve(ImageRequests(), key_of("b")),
    ]
    with pytest.raises(ApiError, match="1 images in the queue, and its share has no room for 3"):
        queue.reserve(ImageRequests(3), key_of("b"))
    held[0].close()
    assert queue.reserve(ImageRequests(3), key_of("b"))


def test_a_key_may_have_pictures_of_as_many_bytes_as_are_free():
    queue, half = queue_of(100), MAX_PICTURE_BYTES // 2
    held = [queue.reserve(ImageRequests(1, half), key_of("a"))]
    with pytest.raises(ApiError) as refusal:
        queue.reserve(ImageRequests(1, 2**20), key_of("a"))
    assert refusal.value.body["error"]["code"] == "queue_share"
    held.append(queue.reserve(ImageRequests(), key_of("a")))  # without a picture
    held.append(queue.reserve(ImageRequests(1, 2**20), key_of("b")))


def test_a_key_that_keeps_the_queue_full_refuses_no_other_key(shared, client_threads):
    server = shared(FakeEngine(delay=0.01), queue=8)
    server.service.queue.turns.set_places(2)
    done, refused = threading.Event(), threading.Semaphore(0)

    def flood():
        while not done.is_set():
            answer = ask(server, "alice")
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "queue_share"
                assert int(answer.headers["retry-after"]) >= 1
                refused.release()
            else:
                assert answer.status_code == 200

    floods = [client_threads.submit(flood) for _ in range(16)]
    try:
        assert refused.acquire(timeout=SECONDS)
        assert [ask(server, "bob").status_code for _ in range(19)] == [200] * 19
    finally:
        done.set()
    for each in floods:
        each.result(SECONDS)


class Line:
    """Images that wait for their turn, and the order in which they had it."""

    def __init__(self, places):
        self.turns = Turns(Metrics())
        self.turns.set_places(places)
        self.order = []
        self._numbers = {}
        self.ends = {}
        self._tasks = []

    async def add(self, name, key, reservation=None, deadline=FOREVER):
        """Let the image `name` wait."""
        self._numbers[name] = key, reservation or len(self._numbers) + 100
        self.ends[name] = asyncio.Event()

        async def wait():
            async with self.turns.turn(*self._numbers[name], deadline):
                self.order.append(name)
                await self.ends[name].wait()

        self._tasks.append(asyncio.ensure_future(wait()))
        await asyncio.sleep(0)
        return self._tasks[-1]

    def before(self, name):
        return self.turns.count_before(*self._numbers[name])

    async def end(self, *names):
        """End the drawing of images."""
        for name in names:
            self.ends[name].set()
        for _ in range(5):  # the next ones start
            await asyncio.sleep(0)

    async def finish(self):
        """End all of them, each when it is its turn."""
        await self.end(*self.ends)
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_keys_take_turns_and_the_images_of_a_key_keep_their_order():
    async def run():
        line = Line(places=1)
        for name in ("a1", "a2", "a3", "a4"):
            await line.add(name, "alice")
        for name in ("b1", "b2"):
            await line.add(name, "bob")
        await line.add("c1", "carol")
        await line.finish()
        assert line.order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]

    asyncio.run(run())


def test_a_request_of_many_images_holds_up_another_key_by_one_image():
    async def run():
        line = Line(places=2)
        for number in range(20):
            await line.add(f"a{number}", "alice", reservation=1)
        await line.add("b", "bob")
        assert line.before("b") == 3  # two that are drawn, and alice's next one
        await line.end("a0", "a1")
        assert line.order == ["a0", "a1", "a2", "b"]
        await line.finish()

    asyncio.run(run())


def test_positions_count_the_images_that_are_before_by_the_order_of_turns():
    async def run():
        line = Line(places=1)
        for name, key in (("a1", "alice"), ("a2", "alice"), ("a3", "alice"), ("b1", "bob")):
            await line.add(name, key)
        await line.add("c1", "carol")
        await line.add("c2", "carol")
        names = ["a1", "a2", "b1", "c1", "a3", "c2"]
        assert [line.before(name) for name in names] == [0, 1, 2, 3, 4, 5]
        assert line.turns.count_before("dave", 1) == 4  # if it came now: a1, a2, b1, c1
        assert line.turns.count_before("bob", 1) == 5
        while names:
            assert [line.before(name) for name in names] == list(range(len(names)))
            await line.end(names.pop(0))
        await line.finish()

    asyncio.run(run())


def test_waiting_images_that_are_cancelled_or_too_late_leave_their_place():
    async def run():
        line = Line(places=1)
        await line.add("a1", "alice")
        cancelled = await line.add("a2", "alice")
        late = await line.add("b1", "bob", deadline=0.0)
        await line.add("c1", "carol")
        cancelled.cancel()
        with pytest.raises(TimeoutError):
            await late
        assert line.before("c1") == 1
        await line.finish()
        assert line.order == ["a1", "c1"]

    asyncio.run(run())


def test_an_image_that_is_cancelled_at_its_turn_gives_it_to_the_next():
    async def run():
        line = Line(places=1)
        await line.add("a1", "alice")
        cancelled = await line.add("a2", "alice")
        await line.add("a3", "alice")
        line.ends["a1"].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        await line.end("a3")
        assert "a3" in line.order
        await line.finish()

    asyncio.run(run())


def test_more_places_start_the_next_images_at_once_and_fewer_end_none():
    async def run():
        line = Line(places=1)
        for name in ("a1", "a2", "a3", "a4"):
            await line.add(name, "alice")
        line.turns.set_places(3)
        await line.end()
        assert line.order == ["a1", "a2", "a3"]
        line.turns.set_places(1)
        await line.end("a1", "a2")
        assert line.order == ["a1", "a2", "a3"]
        await line.end("a3")
        assert line.order == ["a1", "a2", "a3", "a4"]
        await line.finish()

    asyncio.run(run())


def test_under_the_load_of_two_keys_their_images_alternate(shared, client_threads):
    engine = PausedEngine()
    server = shared(engine)
    server.service.queue.turns.set_places(1)
    waiting = [client_threads.submit(ask, server, "alice", n=6, seed=0)]
    engine.wait_for(waiting=1)
    server.wait_for_pending(6)
    waiting += [client_threads.submit(ask, server, "bob", seed=100 + i) for i in range(3)]
    server.wait_for_pending(9)
    assert metric(server, 'sdbatch_images_waiting{key="alice"}') == 5
    assert metric(server, 'sdbatch_images_waiting{key="bob"}') == 3
    assert metric(server, 'sdbatch_images_drawing{key="alice"}') == 1
    drawn = []
    for _ in range(9):
        engine.wait_for(waiting=1)
        drawn.append(engine.waiting[0][1].seed >= 100)
        engine.draw_all()
    assert drawn == [False, False, True, False, True, False, True, False, False]
    assert [each.result().status_code for each in waiting] == [200] * 4
    assert metric(server, 'sdbatch_images_drawing{key="alice"}') == 0


def test_a_client_that_leaves_while_its_image_waits_leaves_its_place(shared, client_threads):
    engine = PausedEngine()
    server = shared(engine)
    server.service.queue.turns.set_places(1)
    first = client_threads.submit(ask, server, "alice")
    engine.wait_for(waiting=1)
    job = server.post("/v1/images/jobs", prompt="a", n=2).json()
    assert job["queue_position"] == 1
    body = {"prompt": "a", "stream": True}
    with server.client.stream("POST", "/v1/images/generations", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines) == ': {"queue_position": 3}'
        server.post(f"/v1/images/jobs/{job['id']}/cancel")
        server.wait_for_pending(2)
    server.wait_for_pending(1)
    engine.draw_all()
    assert first.result().status_code == 200
    assert engine.waiting == []


def test_the_time_limit_counts_waiting(shared):
    engine = PausedEngine()
    server = shared(engine, timeout_s=0.5)
    server.service.queue.turns.set_places(0)
    answer = ask(server, "alice")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    server.wait_for_pending(0)
    server.service.queue.turns.set_places(1)
    assert engine.waiting == []
