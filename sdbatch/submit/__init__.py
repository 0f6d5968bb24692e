"""`sdbatch submit`: a job file to a Ray cluster elsewhere, followed from here.

    pack.contents (what goes along) -> jobs.Jobs (Ray's job API) -> follow.follow (log, progress)

On the cluster runs `sdbatch run`, as `ray job submit` would start it. Jobs are known by the output
that they draw: the same command again finds the one that runs, and follows it.
"""

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdbatch.errors import JobError
from sdbatch.job import load
from sdbatch.report.progress import Display
from sdbatch.storage import Store
from sdbatch.submit import pack
from sdbatch.submit.follow import DETACHED, follow
from sdbatch.submit.jobs import Jobs, Submission

VARIABLE = "SDBATCH_JOB"  # where an image, which takes no files along, finds the job file


@dataclass(frozen=True)
class Asked:
    """What a user wants submitted, and how it is to run."""

    path: str  # of the job file
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of `sdbatch run`
    image: str | None = None  # a container image to run in
    pip: tuple[str, ...] = ()  # requirements to install
    env: Mapping[str, str] = field(default_factory=dict)
    driver_cpus: float = 0.0  # reserved for the driver; 0: it runs on the head


def submit(asked: Asked, address: str, display: Display | None, say: Callable[[str], None]) -> int:
    """Submit the job, or find it where it runs already, and follow it to its end.

    Args:
        asked: what to submit.
        address: of the cluster's dashboard.
        display: where progress is shown; None: it is in the job's log, as JSON.
        say: is told, line by line, the job's log and what a user wants to know.

    Returns:
        The exit code of `sdbatch run` there; DETACHED if Ctrl-C ended the following.

    Raises:
        SdbatchError: it cannot be submitted, or the cluster is lost from sight.
    """
    job = load(asked.path, asked.overrides)
    pack.refuse_lost_output(job)
    files = pack.contents(job)
    jobs = Jobs(address)
    submission = assemble(asked, files, job.output.path)
    running = jobs.drawing(job.output.path)
    if running is None:
        with tempfile.TemporaryDirectory(prefix="sdbatch-") as folder:
            pack.copy(files, Path(asked.path), Path(folder))
            running = jobs.submit(submission, None if asked.image else folder)
        say(f"submitted as {running}")
    elif jobs.digest(running) != submission.digest:
        raise JobError(
            f"output.path = {job.output.path}: {running} draws it already, from another job file "
            f"or with other options. Wait for it, or end it by --stop."
        )
    else:
        say(f"following {running}, which draws this output already")
    try:
        return follow(jobs, running, Store(job.output.path), display, say)
    except KeyboardInterrupt:
        say(f"{running} goes on. The same command again follows it; with --stop it ends it.")
        return DETACHED


def stop(asked: Asked, address: str, say: Callable[[str], None]) -> None:
    """End the job that draws the output; what it has committed stays.

    Raises:
        SdbatchError: there is none.
    """
    job = load(asked.path, asked.overrides)
    jobs = Jobs(address)
    running = jobs.drawing(job.output.path)
    if running is None:
        raise JobError(f"output.path = {job.output.path}: no job of this cluster draws it.")
    jobs.stop(running)
    say(f"stopped {running}. Submit it again to go on.")


def variables(given: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that are given as NAME=VALUE, or NAME as it is here.

    Raises:
        JobError: one has no value here.
    """
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals and name not in os.environ:
            raise JobError(f"--env = {name!r}: has no value here. Set it, or give {name}=VALUE.")
        found[name] = value if equals else os.environ[name]
    return found


def assemble(asked: Asked, files: Mapping[str, Path], output: str) -> Submission:
    """Return what is handed to Ray, but for the files.

    Raises:
        JobError: files are to go along into an image.
    """
    sets = [part for override in asked.overrides for part in ("--set", override)]
    arguments = shlex.join([*sets, *asked.options])
    environment: dict[str, object] = {}
    variables = dict(asked.env)
    command = f"sdbatch run {pack.JOB_FILE}"
    if asked.image:
        if files:
            raise JobError(
                f"--image = {asked.image}: takes no files along, and the job names "
                f"{next(iter(files))}. Put it where the cluster can read it."
            )
        environment["image_uri"] = asked.image
        variables[VARIABLE] = pack.text(Path(asked.path))
        command = f'printf %s "${VARIABLE}" > {pack.JOB_FILE} && {command}'
    if asked.pip:
        environment["pip"] = list(asked.pip)
    if variables:
        environment["env_vars"] = variables
    return Submission(
        command=f"{command} {arguments}".rstrip(),
        environment=environment,
        output=output,
        content=pack.digest(files, Path(asked.path)),
        driver_cpus=asked.driver_cpus,
    )
