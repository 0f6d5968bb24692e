"""`sdbatch serve`: the application on a Ray of its own or elsewhere, until it is told to stop."""

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from sdbatch.batch import ray_setup
from sdbatch.errors import JobError, ModelError
from sdbatch.job import Job
from sdbatch.serve import access
from sdbatch.serve.access import VARIABLE, is_loopback
from sdbatch.serve.application import NAME, assemble


def serve_job(
    job: Job, *, host: str, port: int, address: str | None, show: Callable[[str], None]
) -> int:
    """Serve `job` until SIGINT or SIGTERM; then answer what was taken in, and stop.

    Args:
        job: what to serve: its model, and its sampling where a request says nothing.
        host: the address to listen at.
        port: of TCP.
        address: of a Ray cluster; else as for a run.
        show: is told, line by line, what a user wants to know.

    Returns:
        How many images were still to be drawn when the time to stop was over.

    Raises:
        SdbatchError: it cannot be served.
    """
    digests = access.read(job.serve)
    if not digests and not is_loopback(host):
        raise JobError(
            f"--host = {host!r}: without API keys only this machine is answered. Give "
            f"serve.keys a file of keys, or set {VARIABLE}; or leave --host at 127.0.0.1."
        )
    _refuse_taken(host, port)
    stop = threading.Event()
    show("starting Ray and the engine")
    with ray_setup.connected(address or job.cluster.address, job):
        _refuse_beside_another()
        application = assemble(job, digests)
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        try:
            _deploy(application)
            for number in (signal.SIGINT, signal.SIGTERM):  # after Ray's own
                signal.signal(number, lambda *_: stop.set())
            show(f"serving {job.model.name} at http://{_shown(host)}:{port}/ (Ctrl-C stops it)")
            while not stop.wait(0.5):
                pass
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            show("stopping: what was taken in is still drawn")
            left = _drain(job.serve.timeout_s)
        finally:
            serve.shutdown()
    return left


def _refuse_taken(host: str, port: int) -> None:
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


def _refuse_beside_another() -> None:
    """Refuse a cluster that serves already: its address is another, and its end would be ours."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise JobError(
        "cluster.address = a cluster on which Ray Serve runs already: add this application to it "
        "by `serve deploy`, with import_path sdbatch.serve:build and the job in its args."
    )


def _deploy(application: serve.Application) -> None:
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications[NAME]
        texts = [each.message for each in status.deployments.values()] + [status.message]
        raise ModelError(_last_line(texts)) from error


def _last_line(texts: list[str]) -> str:
    """Return what the exception behind a failed deployment said, which Serve gives as text."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("sdbatch.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    return lines[-1] if lines else "serve = not started: Ray gave no reason. See its log."


def _drain(seconds: float) -> int:
    handle: Any = serve.get_app_handle(NAME)
    left: int = handle.drain.remote(seconds).result()
    return left


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
