"""The service on Ray Serve, and `sdbatch serve`, the command that runs it.

Front     HTTP, queue, API keys, long jobs and stored images: one replica, which has all of it
Drawer    an engine; `serve.min_replicas` to `max_replicas` of them, depending on the load
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState
from starlette.types import Receive, Scope, Send

from sdbatch import job as jobs
from sdbatch import resolve
from sdbatch.batch import pool, ray_setup
from sdbatch.batch.pool import Machines
from sdbatch.engine.request import Request
from sdbatch.errors import JobError, ModelError, SdbatchError, one_line
from sdbatch.job import Job
from sdbatch.models import find_model
from sdbatch.models.find_model import ModelFiles
from sdbatch.output.image_file import encoding_of
from sdbatch.resolve import Resolved
from sdbatch.serve import access, keep, proxy, requests, web
from sdbatch.serve.access import Access, Digests, is_loopback
from sdbatch.serve.drawer import Drawer, DrawFailure, DrawRequest, EncodedImage, Event, Version
from sdbatch.serve.errors import ApiError
from sdbatch.serve.log import log
from sdbatch.serve.redraw import ReplicaDied, ReplicaUnavailable
from sdbatch.serve.requests import ServedModel
from sdbatch.serve.service import Service
from sdbatch.stages.base import Needs
from sdbatch.stages.safety import SafetyPolicy

NAME = "sdbatch"  # of the application
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10, 300  # of load, before replicas are added or removed
FOLLOW_SECONDS = 2.0  # between two looks at the number of replicas
HEALTH_SECONDS = 2.0  # between two health checks, after which a dead replica is replaced
# Of a Front: never reached, or requests, probes too, would wait in Ray's proxy behind others. What
# limits them is the queue and the slots of bodies.
MAX_REQUESTS = 100_000
VERSION_SECONDS = 0.5  # between two questions for a Drawer of the Front's version
ANSWER_SECONDS = 5.0  # for which a Drawer that draws is asked for its version


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for `serve run sdbatch.serve:build job=JOB.yaml`.

    Args:
        args: `job`, the path of a job file; each other is an override, `section.key: value`.

    Raises:
        JobError: Ray is not connected, or the job cannot be served.
    """
    if "job" not in args:
        raise JobError(
            "job = nothing: must be given. Run `serve run sdbatch.serve:build job=JOB.yaml`."
        )
    overrides = [f"{name}={_as_yaml(value)}" for name, value in args.items() if name != "job"]
    if not ray.is_initialized():
        raise JobError("Ray is not connected. Use `serve run` or `serve deploy`.")
    try:
        job = jobs.load(args["job"], overrides)
        keep.prepare(job.serve)
        return make_application(job, access.read_keys(job.serve))
    except SdbatchError as error:  # `serve status` shows the whole traceback: make it short
        raise type(error)(str(error)) from None


def _as_yaml(value: Any) -> str:
    """Return a value of a Serve config as the text of an override; text is YAML already."""
    return value if isinstance(value, str) else json.dumps(value)


def make_application(job: Job, digests: Digests) -> serve.Application:
    """Return the application that serves a job on the connected Ray.

    Raises:
        SdbatchError: the job cannot be served.
    """
    machines = ray_setup.machines(job.cluster.label_selector)
    files, job = resolve.find_model(job)
    sha256 = find_model.sha256(files)
    resolved = resolve.resolve(job, files, machines.gpus, sha256, machines.gpu_types)
    _check_own_limits(resolved.job)
    actor = pool.needs(resolved.job, resolved.engine, machines)
    version = _version_of(resolved.job)
    drawer = _drawer(resolved, actor, _max_replicas(resolved, actor, machines), version)
    settings = resolved.job.serve
    front = serve.deployment(
        serve.ingress(_forward)(Front),
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": pool.FREE_CPUS},
        max_ongoing_requests=MAX_REQUESTS,
        graceful_shutdown_timeout_s=settings.timeout_s,
    )
    model = ServedModel(resolved.job, api_name(files), encoding_of(resolved.job))
    images_each = images_at_once(resolved.engine.most_lanes)
    return front.bind(model, digests, drawer, version, images_each)


def api_name(files: ModelFiles) -> str:
    """Return the API's name of a model: of local files without their folder."""
    return files.path if files.kind in ("builtin", "hub") else Path(files.path).name


def serve_job(
    job: Job, *, host: str, port: int, address: str | None, show: Callable[[str], None]
) -> int:
    """Serve a job until SIGINT or SIGTERM; then answer the accepted requests, and stop.

    Args:
        job: has the model, and the values that a request leaves out.
        host: the address to listen on.
        port: the TCP port.
        address: of a Ray cluster; None: as for a batch run.
        show: called with each line for the user.

    Returns:
        The number of images that could not be drawn within serve.timeout_s of the stop.

    Raises:
        SdbatchError: the job cannot be served.
    """
    digests = access.read_keys(job.serve)
    if not digests and not is_loopback(host):
        raise JobError(
            f"--host = {host!r}: must be an address of this machine alone, as there are no API "
            f"keys. Set serve.keys to a file of keys, or {access.VARIABLE}; or leave --host at "
            f"127.0.0.1."
        )
    _check_port(host, port)
    keep.prepare(job.serve)
    show("starting Ray and the engine")
    os.environ.setdefault(proxy.VARIABLE, proxy.IMPORT_PATH)  # Ray's processes inherit it
    with ray_setup.connected(address or job.cluster.address, job):
        _check_no_other_serve()
        application = make_application(job, digests)
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        try:
            _deploy(application)
            show(f"log: {_log_files() or 'as the logging configuration of Ray Serve says'}")
            shown_host = f"[{host}]" if ":" in host else host
            _wait_for_stop(f"serving {job.model.name} at http://{shown_host}:{port}/", show)
            show("stopping: accepted requests are still answered")
            images_left = _drain(job.serve.timeout_s)
        finally:
            serve.shutdown()
    return images_left


def images_at_once(lanes: int) -> int:
    """Return how many images are sent to a replica at a time, whose engine has `lanes` lanes.

    Enough to refill its lanes without a pause, and more than Serve aims at, so that it adds
    replicas under load; less than a replica accepts, so that none waits in Ray's own queue, which
    knows no keys.
    """
    return lanes + max(1, lanes // 2)


class Front:
    """Answers HTTP; see service.Service.

    Args:
        model: is served.
        digests: the API keys.
        drawers: the replicas with engines.
        version: what they should draw with.
        images_each: how many images a replica is sent at a time.
    """

    def __init__(
        self,
        model: ServedModel,
        digests: Digests,
        drawers: DeploymentHandle,
        version: Version,
        images_each: int,
    ) -> None:
        self._is_serving = False
        self._version = version
        self._replicas = Replicas(drawers, version)
        self._service = Service(model, self._replicas)
        self.web = web.application(self._service, Access(digests, model.job.serve))
        self._service.queue.turns.set_places(model.job.serve.min_replicas * images_each)
        self._following = asyncio.ensure_future(
            self._follow_replicas(drawers.deployment_name, images_each)
        )

    async def log_files(self) -> str | None:
        """Return a pattern for the names of the log files of this Front and of later ones."""
        for handler in logging.getLogger("ray.serve").handlers:
            file = getattr(handler, "target", handler)  # Ray buffers lines in front of the file
            if isinstance(file, logging.FileHandler):
                return str(Path(file.baseFilename).with_name(f"replica_{NAME}_Front_*.log"))
        return None

    async def check_health(self) -> None:
        """Wait, while another Front serves, for a Drawer of the same version.

        Ray Serve calls it before the Front gets requests, and then every few seconds. So an update
        to a job that no Drawer can draw leaves the old Front and its Drawers as they are.
        """
        while not self._is_serving:
            is_alone = not await asyncio.to_thread(_is_a_front_running)
            if is_alone or await self._replicas.have_version(self._version):
                self._is_serving = True
                # not before: the long jobs are those of the Front that serves
                self._maintaining = asyncio.ensure_future(self._service.jobs.maintain())
            else:
                await asyncio.sleep(VERSION_SECONDS)

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for the pending images; return how many are left."""
        return await self._service.drain(seconds)

    async def _follow_replicas(self, deployment: str, images_each: int) -> None:
        """Draw as many images at a time as the running replicas can use.

        Serve's status is the one public source of their number. While it is not available, the
        last number holds; there are places for one replica at least, as images may be what makes
        Serve start it.
        """
        name, is_known = serve.get_replica_context().app_name, True
        while True:
            try:
                status = await asyncio.to_thread(serve.status)
                states = status.applications[name].deployments[deployment].replica_states
                running = states.get(ReplicaState.RUNNING, 0)
                self._service.queue.turns.set_places(max(1, running) * images_each)
                is_known = True
            except Exception as error:  # noqa: BLE001  whatever it is, drawing goes on
                if is_known:  # once, and not every two seconds
                    log.warning("the number of replicas is not known: %s", one_line(error))
                is_known = False
            await asyncio.sleep(FOLLOW_SECONDS)


class ReplicaDrawer(Drawer):
    """A Drawer in a process of its own, which ends with the engine.

    Serve then replaces it at once. If it lived, the next images would be sent to it, and fail,
    until it has missed several health checks.
    """

    def engine_ended(self, error: SdbatchError) -> None:
        """Log the reason and end the process."""
        log.error("the engine cannot go on, so its replica ends: %s", one_line(error))
        os._exit(1)


class Replicas:
    """The Drawers, called through Ray Serve."""

    def __init__(self, handle: DeploymentHandle, version: Version) -> None:
        self._handle = handle
        self._version = version
        self._streaming_handle = handle.options(stream=True)

    async def draw(self, draw_request: DrawRequest) -> EncodedImage | DrawFailure:
        """Draw an image; if this call is cancelled, the image's lanes are released."""
        response = self._handle.draw.remote(replace(draw_request, version=self._version))
        try:
            with _replica_errors():
                result: EncodedImage | DrawFailure = await response
        except asyncio.CancelledError:
            response.cancel()  # Ray Serve does not end a call because its caller was cancelled
            raise
        return result

    async def draw_events(self, draw_request: DrawRequest) -> AsyncGenerator[Event]:
        """Draw an image; yield its progress and previews, then the image or its failure."""
        draw_request = replace(draw_request, version=self._version)
        events = self._streaming_handle.draw_events.remote(draw_request)
        try:
            with _replica_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()

    async def check_health(self) -> None:
        """Wait for a replica that is healthy."""
        await self._handle.check_health.remote()

    async def have_version(self, version: Version) -> bool:
        """Tell whether one of them, any one, draws with this version."""
        with suppress(RayError, RayServeException, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                is_new: bool = await self._handle.has_version.remote(version)
                return is_new
        return False


@contextmanager
def _replica_errors() -> Iterator[None]:
    """Turn Ray's errors into those that lead to a second try."""
    try:
        yield
    except (ActorUnavailableError, RayServeException) as error:
        raise ReplicaUnavailable(one_line(error)) from error
    except RayTaskError as error:
        if isinstance(error, SdbatchError):
            raise ReplicaDied(one_line(error)) from error
        raise  # a bug in the Drawer's own code
    except RayError as error:
        raise ReplicaDied(one_line(error)) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # the replica cancelled its call, for example at the end of its graceful shutdown
        raise ReplicaUnavailable("The replica cancelled the call.") from error


def _check_own_limits(job: Job) -> None:
    """Raise a JobError if the job's own sampling exceeds its serve.limits."""
    try:
        request = Request.model_validate({**job.sampling.model_dump(), "prompt": ""})
        requests.check_limits(request, 1, job.serve.limits)
    except ApiError as error:
        text = f"sampling.{error.parts[0]} Raise serve.limits, or lower this value."
        raise JobError(text) from error


def _max_replicas(resolved: Resolved, actor: Needs, machines: Machines) -> int:
    settings = resolved.job.serve
    fitting = pool.fit(resolved.job.cluster, actor, machines, sys.maxsize).most
    most = fitting if settings.max_replicas == "auto" else settings.max_replicas
    if settings.min_replicas > min(fitting, most):
        raise JobError(
            f"serve.min_replicas = {settings.min_replicas}: must be {min(fitting, most)} at most: "
            f"serve.max_replicas or the cluster allows no more. Lower it, or use a larger cluster."
        )
    return most


def _drawer(
    resolved: Resolved, actor: Needs, max_replicas: int, version: Version
) -> serve.Application:
    """Return the deployment of the Drawers."""
    job, engine = resolved.job, resolved.engine
    ongoing = engine.most_lanes  # twice the guided images that fill the lanes
    return serve.deployment(
        ReplicaDrawer,
        name="Drawer",
        ray_actor_options=pool.ray_options(actor),
        max_ongoing_requests=2 * ongoing,
        autoscaling_config={
            "min_replicas": job.serve.min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": ongoing,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        },
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=job.serve.timeout_s,  # it draws what it has accepted
        max_constructor_retry_count=1,
    ).bind(
        resolved.make_engine(), SafetyPolicy(job.safety.policy), max(1, int(actor.cpus)), version
    )


def _version_of(job: Job) -> Version:
    encoding = encoding_of(job)
    settings = job.model_dump_json(include={"model", "engine", "safety"})
    return Version(
        settings=f"{encoding.software} {settings}",
        defaults=job.sampling.model_dump_json(),
        model=encoding.model,
        model_hash=encoding.model_hash,
    )


def _is_a_front_running() -> bool:
    """Tell whether this application has a Front that gets requests."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return bool(application.deployments["Front"].replica_states.get(ReplicaState.RUNNING))


def _forward() -> "_Forward":
    return _Forward()


class _Forward:
    """The ASGI application that Ray Serve needs before a Front exists; passes all on to it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        front: Any = serve.get_replica_context().servable_object
        await front.web(scope, receive, send)


def _check_port(host: str, port: int) -> None:
    """Raise a JobError if nothing can listen at the address and port."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise JobError(
            f"--host, --port = {host}, {port}: cannot listen there ({error.strerror}). "
            f"Choose another port."
        ) from error


def _check_no_other_serve() -> None:
    """Reject a cluster that serves already: it has another address, and the stop would end both."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise JobError(
        "Ray Serve already runs on this cluster. Add this application to it with `serve deploy`: "
        "import_path sdbatch.serve:build, with the job in its args."
    )


def _deploy(application: serve.Application) -> None:
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications[NAME]
        messages = [each.message for each in status.deployments.values()]
        raise ModelError(_failure_reason([*messages, status.message])) from error


def _failure_reason(messages: list[str]) -> str:
    """Return the text of the exception behind a failed deployment, which Serve gives as text."""
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("sdbatch.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    return lines[-1] if lines else "Ray Serve did not start, and gave no reason. See Ray's log."


def _wait_for_stop(text: str, show: Callable[[str], None]) -> None:
    """Show that the service runs, and wait for SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # these replace Ray's own handlers
        signal.signal(number, lambda *_: stop.set())
    show(f"{text} (Ctrl-C stops it)")
    while not stop.wait(0.5):
        pass
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _log_files() -> str | None:
    handle: Any = serve.get_app_handle(NAME)
    files: str | None = handle.log_files.remote().result()
    return files


def _drain(seconds: float) -> int:
    handle: Any = serve.get_app_handle(NAME)
    images_left: int = handle.drain.remote(seconds).result()
    return images_left
