"""The service on Ray Serve: one Front before replicas of Drawers, each with its engine.

Front     HTTP, queue, keys, jobs and images kept; one, so that all of it stands in one place
Drawer    an engine; as many as `serve.min_replicas` to `max_replicas` say, by the load
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from sdbatch import job
from sdbatch.batch import pipeline, pool, ray_setup
from sdbatch.errors import JobError, SdbatchError
from sdbatch.job import Job
from sdbatch.models import find_model as models
from sdbatch.serve import access, requests, web
from sdbatch.serve.access import Access, Digests
from sdbatch.serve.drawer import Asked, Drawer, NotDrawn, Picture
from sdbatch.serve.errors import Refusal, lost
from sdbatch.serve.requests import Offer
from sdbatch.serve.service import Event, Service
from sdbatch.stages.draw import load_engine

NAME = "sdbatch"  # of the application
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10, 300  # of load, before replicas come or go
CONNECTIONS = 256  # beside those whose images are in the queue: polls, pages, refusals


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for `serve run sdbatch.serve:build job=jobs/dataset.yaml`.

    Args:
        args: `job`, the path of a job file; any other is an override, `section.key: value`.

    Raises:
        JobError: there is no Ray, or the job cannot be served.
    """
    options = {name: value for name, value in args.items() if name != "job"}
    if "job" not in args:
        raise JobError("job = nothing: must be given: serve run sdbatch.serve:build job=JOB.yaml")
    asked = job.load(args["job"], [f"{name}={value}" for name, value in options.items()])
    if not ray.is_initialized():
        raise JobError("ray = not connected: run this by `serve run` or `serve deploy`.")
    return assemble(asked, access.read(asked.serve))


def assemble(asked: Job, digests: Digests) -> serve.Application:
    """Return the application that serves the job `asked`, on the Ray that is connected."""
    machines = ray_setup.machines(asked.cluster.label_selector)
    files, asked = pipeline.find_model(asked)
    resolved = pipeline.resolve_job(asked, machines, models.sha256(files))
    settings, engine = resolved.serve, resolved.engine
    fitting = pool.fit(resolved.cluster, engine, machines, sys.maxsize).most
    most = fitting if settings.max_replicas == "auto" else settings.max_replicas
    if settings.min_replicas > min(fitting, most):
        raise JobError(
            f"serve.min_replicas = {settings.min_replicas}: must be {min(fitting, most)} at most, "
            f"as many as serve.max_replicas or the cluster holds."
        )
    try:
        requests.check(resolved.sampling, 1, settings.limits)
    except Refusal as refusal:
        raise JobError(
            f"sampling.{refusal} Raise serve.limits, or have the job ask for less."
        ) from refusal
    cpus, _ = pool.per_actor(resolved.cluster, engine)
    pixels = resolved.sampling.height * resolved.sampling.width
    make_engine = partial(load_engine, files, engine, pixels, pipeline.example(resolved))
    ongoing = pool.most_lanes(engine)  # twice the guided images that fill its lanes
    drawer = serve.deployment(
        Drawer,
        name="Drawer",
        ray_actor_options=pool.options(resolved.cluster, engine),
        max_ongoing_requests=2 * ongoing,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": most,
            "target_ongoing_requests": ongoing,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        },
        graceful_shutdown_timeout_s=settings.timeout_s,
        max_constructor_retry_count=1,
    ).bind(make_engine, resolved.safety.policy, max(1, int(cpus)))
    front = serve.deployment(
        serve.ingress(_forward)(Front),
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": pool.CHEAP_CPUS},
        max_ongoing_requests=settings.queue + CONNECTIONS,
        graceful_shutdown_timeout_s=settings.timeout_s,
    )
    return front.bind(
        Offer(resolved, model_id(files), pipeline.encoding(resolved)), digests, drawer
    )


def model_id(files: models.ModelFiles) -> str:
    """Return what the API calls a model: of files of this machine their name alone."""
    return files.path if files.kind in ("builtin", "hub") else Path(files.path).name


class Front:
    """Answers HTTP; see service.Service."""

    def __init__(self, offer: Offer, digests: Digests, drawers: DeploymentHandle) -> None:
        self._service = Service(offer, Replicas(drawers))
        settings = offer.job.serve
        self.web = web.application(
            self._service, Access(digests, settings.limits), log_prompts=settings.log_prompts
        )

    async def drain(self, seconds: float) -> int:
        """Take nothing in any more, wait for what is open; return how much of it is left."""
        return await self._service.drain(seconds)


class Replicas:
    """The Drawers, through Ray Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)

    async def draw(self, asked: Asked) -> Picture | NotDrawn:
        """Draw an image; cancelled, its lanes are free."""
        response = self._handle.draw.remote(asked)
        try:
            with _losses():
                drawn: Picture | NotDrawn = await response
        except asyncio.CancelledError:
            response.cancel()  # Ray Serve goes on with a call that nobody waits for
            raise
        return drawn

    async def follow(self, asked: Asked) -> AsyncGenerator[Event]:
        """Draw an image and tell of it on its way."""
        events = self._stream.follow.remote(asked)
        try:
            with _losses():
                async for event in events:
                    yield event
        finally:
            events.cancel()

    async def check_health(self) -> None:
        """Wait for a replica that says it is well."""
        await self._handle.check_health.remote()


@contextmanager
def _losses() -> Iterator[None]:
    """Tell whoever waits for a replica that died, or whose engine broke, that it can ask again."""
    try:
        yield
    except (RayError, RayServeException) as error:
        if isinstance(error, RayTaskError) and not isinstance(error, SdbatchError):
            raise  # a fault of the Drawer's own code
        raise lost() from error


def _forward() -> "_Forward":
    return _Forward()


class _Forward:
    """Ray Serve wants an ASGI application before there is a Front; this passes all on to it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        front: Any = serve.get_replica_context().servable_object
        await front.web(scope, receive, send)
