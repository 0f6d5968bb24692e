"""Images that are fetched by URL, and long jobs: stored for a limited time, up to some bytes."""

import asyncio
import re
import time

from sdbatch.engine.request import Request
from sdbatch.job import Limits
from sdbatch.serve.access import ApiKey
from sdbatch.serve.drawer import DrawRequest, EncodedImage, ImageFacts
from sdbatch.serve.requests import ImageRequest, ServedModel
from sdbatch.serve.service import Service
from tests.serve.conftest import ENCODING, job_of

KIB = 1024
FACTS = ImageFacts(64, 64, 2, False, 1, False, False, nsfw=None, nsfw_scores=None, sha256="")


def service_of(drawers=None):
    """Return a service that stores 1 MiB of images, and as much of long jobs, for 300 s."""
    job = job_of(serve={"keep_mib": 1, "keep_s": 300})
    return Service(ServedModel(job, "tiny", ENCODING), drawers)


def request_of(seed=0, by_url=False):
    request = Request(prompt="a", seed=seed, height=64, width=64)
    return ImageRequest((DrawRequest(request, ENCODING),), by_url)


def store(service, kib):
    """Store an image of some size; return its name."""
    image = EncodedImage(bytes(kib * KIB), FACTS, preview=False)
    result = asyncio.run(service.stored_images.store(request_of(by_url=True), [image]))
    return result.images[0].content


def are_stored(service, *names):
    return [asyncio.run(service.stored_images.fetch(name)) is not None for name in names]


def test_names_of_images_cannot_be_guessed():
    service = service_of()
    names = {store(service, 1) for _ in range(10)}
    assert len(names) == 10
    # the time in microseconds, then 18 random bytes
    assert all(re.fullmatch(r"[0-9a-f]{14}-[\w-]{24}\.png", name) for name in names)


def test_images_that_nobody_fetched_for_longest_are_evicted_first():
    service = service_of()
    first, second = store(service, 400), store(service, 400)
    assert are_stored(service, first, second) == [True, True]
    third = store(service, 400)
    assert are_stored(service, first, second, third) == [False, True, True]
    assert are_stored(service, second) == [True]
    fourth = store(service, 400)
    assert are_stored(service, second, third, fourth) == [True, False, True]


def test_an_image_that_is_larger_than_the_limit_is_stored_alone():
    service = service_of()
    small, large = store(service, 1), store(service, 2 * KIB)
    assert are_stored(service, small, large) == [False, True]
    assert are_stored(service, store(service, 1), large) == [True, False]


def test_images_expire():
    service = service_of()
    now = time.monotonic()
    name = store(service, 1)
    service.stored_images.files.expire(now + 299)
    assert are_stored(service, name) == [True]
    service.stored_images.files.expire(time.monotonic() + 300)
    assert are_stored(service, name) == [False]


async def start(service, image_request):
    reservation = service.reserve(image_request, ApiKey("test", Limits()))
    return await service.jobs.start(image_request, "test", reservation)


async def found(service, *jobs):
    return [await service.jobs.find(job.name) for job in jobs]


def test_long_jobs_are_evicted_only_after_they_have_ended():
    asyncio.run(run_long_jobs())


async def run_long_jobs():
    drawn = asyncio.Event()

    class Drawers:
        async def draw_events(self, draw_request):
            if draw_request.request.seed == 0:
                await drawn.wait()
            yield EncodedImage(bytes(600 * KIB), FACTS, preview=False)

    service = service_of(Drawers())
    running = await start(service, request_of(seed=0))
    ended = []
    for seed in (1, 2):
        ended.append(await start(service, request_of(seed)))
        await ended[-1].task
    assert await found(service, running, *ended) == [running, None, ended[1]]
    assert running.status == "queued"
    drawn.set()
    await running.task
    assert await found(service, running, *ended) == [running, None, None]
    assert running.status == "completed"
    service.jobs.stored.ended.expire(time.monotonic() + 300)
    assert await found(service, running) == [None]
