"""Ray's job API as a submitter needs it; what goes wrong there is told in one line."""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbatch.errors import JobError, SdbatchError

OUTPUT, DIGEST = "sdbatch_output", "sdbatch_digest"  # keys of a job's metadata
_TOKEN_FILE = "~/.ray/auth_token"  # where Ray looks for a token


@dataclass(frozen=True)
class Submission:
    """A job as it is handed to Ray."""

    command: str
    environment: dict[str, Any]  # Ray's runtime environment, without the files
    output: str
    content: str  # hash of the files
    driver_cpus: float

    @property
    def digest(self) -> str:
        """Return what tells this submission from others that draw the same output.

        Not the variables: keys of an object store change from hour to hour.
        """
        env = {key: value for key, value in self.environment.items() if key != "env_vars"}
        said = [self.command, env, self.content, self.driver_cpus]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """A job at a moment."""

    over: bool
    exit_code: int | None  # of its command, where that ran to its end
    message: str  # why it is so


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        _send_token()
        from ray.job_submission import JobSubmissionClient

        if "://" in address and not address.startswith(("http://", "https://")):
            raise JobError(
                f"--address = {address!r}: must be that of the cluster's dashboard, such as "
                f"http://HEAD:8265."
            )
        self._address = address
        with self._told():
            self._client = JobSubmissionClient(address if "://" in address else f"http://{address}")

    def drawing(self, output: str) -> str | None:
        """Return the job that draws `output` now, or waits to; None if there is none."""
        with self._told():
            jobs = self._client.list_jobs()
        for job in jobs:
            mine = (job.metadata or {}).get(OUTPUT) == output.rstrip("/")
            if mine and not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def digest(self, name: str) -> str | None:
        """Return what tells the job from others that draw the same output."""
        with self._told():
            return (self._client.get_job_info(name).metadata or {}).get(DIGEST)

    def submit(self, submission: Submission, folder: str | None) -> str:
        """Hand over a job, with the files in `folder`; return its name.

        Its number is the next one of its output: of two submitters at a time Ray refuses one.
        """
        stem = f"sdbatch-{hashlib.sha256(submission.output.encode()).hexdigest()[:10]}-"
        with self._told():
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
        """Return how the job is."""
        with self._told():
            info = self._client.get_job_info(name)
        text = " ".join((info.message or "").split())
        return State(info.status.is_terminal(), info.driver_exit_code, f"{info.status}: {text}")

    def log(self, name: str) -> str:
        """Return all that the job has printed so far."""
        with self._told():
            return str(self._client.get_job_logs(name))

    async def tail(self, name: str) -> AsyncIterator[str]:
        """Yield what the job has printed, from its start, and then what it prints."""
        with self._told():
            async for text in self._client.tail_job_logs(name):
                yield text

    def stop(self, name: str) -> None:
        """Have the job ended."""
        with self._told():
            self._client.stop_job(name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what Ray's client raises into a JobError."""
        try:
            yield
        except (SdbatchError, asyncio.CancelledError):
            raise
        except Exception as error:  # of many kinds: Ray's own, those of its HTTP clients, bare ones
            raise JobError(f"--address = {self._address}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError):
        return (
            f"wants its token: must be in RAY_AUTH_TOKEN, or in {_TOKEN_FILE}. Copy it from the "
            f"cluster's head."
        )
    text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return f"{text}. Must be a Ray cluster's dashboard, within reach, such as http://HEAD:8265."


def _send_token() -> None:
    """Have Ray's client send the token that there is: by itself it does so on the cluster alone."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or Path(_TOKEN_FILE).expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
