"""The jobs of a Ray cluster, through Ray's job API; its errors become one-line JobErrors.

Proxies cut connections that are quiet for a moment: a request whose answer was cut is sent again.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdbatch.errors import JobError, SdbatchError, one_line
from sdbatch.retries import try_again

OUTPUT, DIGEST = "sdbatch_output", "sdbatch_digest"  # keys of a job's metadata
_T = TypeVar("_T")
_TOKEN_FILE = "~/.ray/auth_token"  # where Ray looks for a token


@dataclass(frozen=True)
class Submission:
    """A job as Ray receives it."""

    command: str
    environment: dict[str, Any]  # Ray's runtime environment, without the files
    output: str
    content: str  # hash of the files
    driver_cpus: float

    @property
    def digest(self) -> str:
        """Return a hash that distinguishes this submission from others with the same output.

        Without the environment variables: an object store's keys may change every hour.
        """
        env = {key: value for key, value in self.environment.items() if key != "env_vars"}
        parts = [self.command, env, self.content, self.driver_cpus]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """The state of a job at one moment."""

    ended: bool
    exit_code: int | None  # of its command; None if the command did not run to its end
    message: str  # Ray's status and its explanation


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        _enable_token()
        from ray.job_submission import JobSubmissionClient

        if "://" in address and not address.startswith(("http://", "https://")):
            raise JobError(
                f"--address = {address!r}: must be the address of the cluster's dashboard, such as "
                f"http://HEAD:8265."
            )
        self._address = address
        url = address if "://" in address else f"http://{address}"
        self._client = self._send(lambda: JobSubmissionClient(url))

    def find_active(self, output: str) -> str | None:
        """Return the name of the job that draws `output` or waits to; None without one."""
        for job in self._send(self._client.list_jobs):
            same_output = (job.metadata or {}).get(OUTPUT) == output.rstrip("/")
            if same_output and not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def digest(self, name: str) -> str | None:
        """Return the digest of the job's submission."""
        info = self._send(lambda: self._client.get_job_info(name))
        return (info.metadata or {}).get(DIGEST)

    def submit(self, submission: Submission, folder: str | None) -> str:
        """Submit a job with the files in `folder`; return its name.

        The name ends with the next free number for the output, so that Ray rejects one of two
        simultaneous submissions.
        """
        stem = f"sdbatch-{hashlib.sha256(submission.output.encode()).hexdigest()[:10]}-"
        jobs = self._send(self._client.list_jobs)
        number = 1 + sum((job.submission_id or "").startswith(stem) for job in jobs)
        name = f"{stem}{number}"
        files = {"working_dir": folder} if folder else {}
        attempts = itertools.count()

        def send() -> str:
            if next(attempts) and self._is_submitted(name, submission):
                return name  # only the answer was cut
            return str(
                self._client.submit_job(
                    entrypoint=submission.command,
                    runtime_env={**submission.environment, **files},
                    submission_id=name,
                    metadata={
                        OUTPUT: submission.output.rstrip("/"),
                        DIGEST: submission.digest,
                    },
                    entrypoint_num_cpus=submission.driver_cpus or None,
                )
            )

        return self._send(send)

    def _is_submitted(self, name: str, submission: Submission) -> bool:
        jobs = self._client.list_jobs()
        digests = [(job.metadata or {}).get(DIGEST) for job in jobs if job.submission_id == name]
        return digests == [submission.digest]

    def state(self, name: str) -> State:
        """Return the current state of the job."""
        with self._ray_errors():
            info = self._client.get_job_info(name)
        message = f"{info.status}: {one_line(info.message or '')}"
        return State(info.status.is_terminal(), info.driver_exit_code, message)

    def read_log(self, name: str) -> str:
        """Return everything that the job has printed so far."""
        return self._send(lambda: str(self._client.get_job_logs(name)))

    async def tail_log(self, name: str) -> AsyncIterator[str]:
        """Yield the job's log from its first character, and then new text as the job prints it."""
        with self._ray_errors():
            async for text in self._client.tail_job_logs(name):
                yield text

    def stop(self, name: str) -> None:
        """Stop the job."""
        self._send(lambda: self._client.stop_job(name))

    def _send(self, request: Callable[[], _T]) -> _T:
        """Send a request, again if its connection is cut; it may arrive twice without harm."""
        with self._ray_errors():
            return try_again(self._address, request, _was_cut)

    @contextlib.contextmanager
    def _ray_errors(self) -> Iterator[None]:
        """Turn an error of Ray's client into a JobError."""
        try:
            yield
        except (SdbatchError, asyncio.CancelledError):
            raise
        except Exception as error:  # Ray's own errors, its HTTP clients', bare Exceptions
            raise JobError(f"--address = {self._address}: {_describe(error)}") from error


def _was_cut(error: BaseException | None) -> bool:
    """Tell whether a connection stood and was cut before the answer."""
    while error is not None and not isinstance(error, ConnectionResetError):
        error = error.__cause__ or error.__context__
    return error is not None


def _describe(error: Exception) -> str:
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError):
        return (
            f"the cluster requires its token in RAY_AUTH_TOKEN or in {_TOKEN_FILE}. Copy the token "
            f"from the cluster's head."
        )
    text = one_line(error, 300).rstrip(".") or type(error).__name__
    return f"{text}. Must be the reachable dashboard of a Ray cluster, such as http://HEAD:8265."


def _enable_token() -> None:
    """Make Ray's client send the token if there is one: by default it does so on clusters only."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or Path(_TOKEN_FILE).expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
