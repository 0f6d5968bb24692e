"""The jobs of a Ray cluster, through Ray's job API; its errors become one-line JobErrors."""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbatch.errors import JobError, SdbatchError, one_line

OUTPUT, DIGEST = "sdbatch_output", "sdbatch_digest"  # keys of a job's metadata
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
        with self._ray_errors():
            self._client = JobSubmissionClient(address if "://" in address else f"http://{address}")

    def find_active(self, output: str) -> str | None:
        """Return the name of the job that draws `output` or waits to; None without one."""
        with self._ray_errors():
            jobs = self._client.list_jobs()
        for job in jobs:
            same_output = (job.metadata or {}).get(OUTPUT) == output.rstrip("/")
            if same_output and not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def digest(self, name: str) -> str | None:
        """Return the digest of the job's submission."""
        with self._ray_errors():
            return (self._client.get_job_info(name).metadata or {}).get(DIGEST)

    def submit(self, submission: Submission, folder: str | None) -> str:
        """Submit a job with the files in `folder`; return its name.

        The name ends with the next free number for the output, so that Ray rejects one of two
        simultaneous submissions.
        """
        stem = f"sdbatch-{hashlib.sha256(submission.output.encode()).hexdigest()[:10]}-"
        with self._ray_errors():
            number = 1 + sum(
                (job.submission_id or "").startswith(stem) for job in self._client.list_jobs()
            )
            files = {"working_dir": folder} if folder else {}
            return str(
                self._client.submit_job(
                    entrypoint=submission.command,
                    runtime_env={**submission.environment, **files},
                    submission_id=f"{stem}{number}",
                    metadata={
                        OUTPUT: submission.output.rstrip("/"),
                        DIGEST: submission.digest,
                    },
                    entrypoint_num_cpus=submission.driver_cpus or None,
                )
            )

    def state(self, name: str) -> State:
        """Return the current state of the job."""
        with self._ray_errors():
            info = self._client.get_job_info(name)
        message = f"{info.status}: {one_line(info.message or '')}"
        return State(info.status.is_terminal(), info.driver_exit_code, message)

    def read_log(self, name: str) -> str:
        """Return everything that the job has printed so far."""
        with self._ray_errors():
            return str(self._client.get_job_logs(name))

    async def tail_log(self, name: str) -> AsyncIterator[str]:
        """Yield the job's log from its first character, and then new text as the job prints it."""
        with self._ray_errors():
            async for text in self._client.tail_job_logs(name):
                yield text

    def stop(self, name: str) -> None:
        """Stop the job."""
        with self._ray_errors():
            self._client.stop_job(name)

    @contextlib.contextmanager
    def _ray_errors(self) -> Iterator[None]:
        """Turn an error of Ray's client into a JobError."""
        try:
            yield
        except (SdbatchError, asyncio.CancelledError):
            raise
        except Exception as error:  # Ray's own errors, its HTTP clients', bare Exceptions
            raise JobError(f"--address = {self._address}: {_describe(error)}") from error


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
