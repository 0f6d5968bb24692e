"""`serve.keep` on S3: long jobs and images by URL outlive their process; a store that fails."""

import asyncio

import pytest

from sdbatch import storage
from sdbatch.engine.request import Request
from sdbatch.errors import JobError
from sdbatch.job import Limits
from sdbatch.job import Serve as Settings
from sdbatch.serve import keep
from sdbatch.serve.access import ApiKey
from sdbatch.serve.drawer import Drawer, DrawRequest
from sdbatch.serve.errors import ApiError
from sdbatch.serve.requests import ImageRequest, ServedModel, repeat
from sdbatch.serve.service import Service
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.serve.conftest import ENCODING, PausedEngine, job_of
from tests.stores import servers


@pytest.fixture
def place(monkeypatch):
    """An S3 server behind a proxy, with connections that wait two seconds for an answer."""
    with servers.start("s3") as place:
        keep.prepare(Settings(keep=f"{place.url}/kept"))
        monkeypatch.setattr(storage, "ANSWER_SECONDS", 2.0)
        monkeypatch.setattr(keep, "RETRY_SECONDS", 0.0)
        yield place


def service_of(place, engine):
    job = job_of(serve={"keep": f"{place.url}/kept"})
    drawer = Drawer(lambda: engine, SafetyPolicy("flag"))
    return Service(ServedModel(job, "tiny", ENCODING), drawer)


async def begin(service, **options):
    request = Request(prompt="a", seed=7, height=64, width=64)
    image_request = ImageRequest(repeat(DrawRequest(request, ENCODING), 2), **options)
    reservation = service.reserve(image_request, ApiKey("ann", Limits()))
    return await service.jobs.start(image_request, "ann", reservation)


async def end_of(service, name):
    while not (job := await service.jobs.find(name)).has_ended:
        await asyncio.wait([job.task])
    return job


def test_jobs_and_images_by_url_outlive_their_process(place):
    async def accept():
        service = service_of(place, PausedEngine())
        return [(await begin(service, by_url=by_url)).name for by_url in (False, True)]

    async def resume(names):
        service = service_of(place, FakeEngine())
        maintaining = asyncio.ensure_future(service.jobs.maintain())
        jobs = [await end_of(service, name) for name in names]
        maintaining.cancel()
        return jobs

    async def read(names):
        service = service_of(place, PausedEngine())
        jobs = [await end_of(service, name) for name in names]
        by_url = jobs[1].result.images
        files = [await service.stored_images.fetch(image.content) for image in by_url]
        await service.jobs.stored.remove_expired(frozenset())
        await service.stored_images.remove_expired()
        return jobs, files

    names = asyncio.run(accept())
    first = asyncio.run(resume(names))
    second, files = asyncio.run(read(names))
    for before, after in zip(first, second, strict=True):
        assert after.request == before.request
        assert after.end == before.end
    assert [file.startswith(b"\x89PNG") for file in files] == [True, True]
    kept = place.keys("kept/jobs")
    assert sum(name.endswith(".json") for name in kept) == 4
    assert sum(name.endswith(".png") for name in kept) == 2


def test_only_the_first_of_two_ends_counts(place):
    async def draw_twice():
        engines = [PausedEngine(), PausedEngine()]
        services = [service_of(place, engine) for engine in engines]
        job = await begin(services[0])
        other = await services[1].jobs.find(job.name)
        for engine in engines:
            while len(engine.waiting) < 2:
                await asyncio.sleep(0.01)
            engine.draw_all()
        await asyncio.wait([job.task, other.task])
        return [await service.jobs.find(job.name) for service in services]

    first, second = asyncio.run(draw_twice())
    assert first.end == second.end
    assert sum(name.endswith(".png") for name in place.keys("kept/jobs")) == 2


def test_a_store_that_is_not_reached_refuses_jobs_with_a_retryable_error(place, monkeypatch):
    monkeypatch.setattr(keep, "ANSWER_SECONDS", 5.0)

    async def refused():
        service = service_of(place, FakeEngine())
        place.proxy.fall_silent()
        with pytest.raises(ApiError, match=r"\(serve.keep\) cannot be written") as raised:
            await begin(service)
        place.proxy.forward()
        assert raised.value.status == 503
        assert service.queue.pending == 0
        return (await begin(service)).name

    assert asyncio.run(refused())


def test_a_service_does_not_start_on_a_store_that_is_not_reached(place):
    with (
        place.with_settings(**servers.s3_settings(servers.NOWHERE)),
        pytest.raises(JobError, match=r"^serve.keep = s3://datasets/other/images: .*must be reach"),
    ):
        keep.prepare(Settings(keep="s3://datasets/other"))
    words = "^serve.keep = s3://nowhere/kept/images: .*bucket does not exist"
    with pytest.raises(JobError, match=words):
        keep.prepare(Settings(keep="s3://nowhere/kept"))
