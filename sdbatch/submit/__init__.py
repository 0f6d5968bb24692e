"""`sdbatch submit`: send a job file to a Ray cluster elsewhere, and follow the job from here.

    pack.files_to_send -> jobs.Jobs (Ray's job API) -> follow.follow_job (log, progress)

The cluster runs `sdbatch run`, as `ray job submit` would start it. A job is identified by its
output: the same command again finds the running job and follows it.
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
from sdbatch.submit.follow import DETACHED, follow_job
from sdbatch.submit.jobs import Jobs, Submission
from sdbatch.urls import without_secrets

VARIABLE = "SDBATCH_JOB"  # holds the job file for a container image, which receives no files


@dataclass(frozen=True)
class SubmitOptions:
    """The job to submit, and how it runs on the cluster."""

    path: str  # of the job file
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of `sdbatch run`
    image: str | None = None  # a container image to run in
    pip: tuple[str, ...] = ()  # requirements to install
    env: Mapping[str, str] = field(default_factory=dict)
    driver_cpus: float = 0.0  # reserved for the driver; 0: it runs on the head


def submit(
    options: SubmitOptions, address: str, display: Display | None, echo: Callable[[str], None]
) -> int:
    """Submit the job, or find it if it already runs, and follow it to its end.

    Args:
        options: the job and its options.
        address: of the cluster's dashboard.
        display: shows progress; None: progress stays in the job's log, as JSON.
        echo: prints a line, of the job's log or about the submission.

    Returns:
        The exit code of `sdbatch run` on the cluster; DETACHED if Ctrl-C ended the following.

    Raises:
        SdbatchError: the job cannot be submitted, or the cluster no longer answers.
    """
    job = load(options.path, options.overrides)
    pack.check_output_path(job)
    files = pack.files_to_send(job)
    jobs = Jobs(address)
    submission = make_submission(options, files, job.output.path)
    name = jobs.find_active(submission.output)
    if name is None:
        with tempfile.TemporaryDirectory(prefix="sdbatch-") as folder:
            pack.copy_files(files, Path(options.path), Path(folder))
            name = jobs.submit(submission, None if options.image else folder)
        echo(f"submitted as {name}")
    elif jobs.digest(name) != submission.digest:
        raise JobError(
            f"output.path = {job.output.path}: {name} draws it already, from another job file "
            f"or with other options. Wait for its end, or stop it with --stop."
        )
    else:
        echo(f"following {name}, which draws this output already")
    try:
        return follow_job(jobs, name, Store(job.output.path), display, echo)
    except KeyboardInterrupt:
        echo(
            f"{name} keeps running on the cluster. Run the same command again to follow it, or "
            f"with --stop to stop it."
        )
        return DETACHED


def stop(options: SubmitOptions, address: str, echo: Callable[[str], None]) -> None:
    """Stop the job that draws the output; committed shards stay.

    Raises:
        SdbatchError: no job draws it.
    """
    job = load(options.path, options.overrides)
    jobs = Jobs(address)
    name = jobs.find_active(without_secrets(job.output.path))
    if name is None:
        raise JobError(f"output.path = {job.output.path}: no job of this cluster draws it.")
    jobs.stop(name)
    echo(f"stopped {name}. Submit it again to go on.")


def parse_env(variables: Sequence[str]) -> dict[str, str]:
    """Return environment variables from NAME=VALUE, or from NAME with its value here.

    Raises:
        JobError: a variable has no value here.
    """
    env = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals and name not in os.environ:
            raise JobError(f"--env = {name!r}: has no value here. Set it, or use {name}=VALUE.")
        env[name] = value if equals else os.environ[name]
    return env


def make_submission(options: SubmitOptions, files: Mapping[str, Path], output: str) -> Submission:
    """Return the submission for Ray, without the files themselves.

    Raises:
        JobError: the job needs files, and a container image receives none; or the cluster's
            dashboard would show a secret.
    """
    sets = [part for override in options.overrides for part in ("--set", override)]
    arguments = shlex.join([*sets, *options.options])
    if without_secrets(arguments) != arguments:
        raise JobError(
            f"--set = {without_secrets(shlex.join(options.overrides))}: holds a password or key, "
            f"which the cluster's dashboard would show. Put the URL into the job file, or the key "
            f"into the cluster's environment."
        )
    environment: dict[str, object] = {}
    env_vars = dict(options.env)
    command = f"sdbatch run {pack.JOB_FILE}"
    if options.image:
        if files:
            raise JobError(
                f"--image = {options.image}: a container image receives no files, and the job "
                f"names {next(iter(files))}. Put it where the cluster can read it."
            )
        environment["image_uri"] = options.image
        env_vars[VARIABLE] = text = pack.read_job_file(Path(options.path))
        if without_secrets(text) != text:
            raise JobError(
                f"--image = {options.image}: the dashboard would show the job file, and a URL in "
                f"it holds a password or key. Put that into the cluster's environment."
            )
        command = f'printf %s "${VARIABLE}" > {pack.JOB_FILE} && {command}'
    if options.pip:
        environment["pip"] = list(options.pip)
    if env_vars:
        environment["env_vars"] = env_vars
    return Submission(
        command=f"{command} {arguments}".rstrip(),
        environment=environment,
        output=without_secrets(output),
        content=pack.hash_files(files, Path(options.path)),
        driver_cpus=options.driver_cpus,
    )
