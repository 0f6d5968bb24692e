"""The files that a submitted job needs: the job file, and local files it names by relative paths.

The cluster itself finds URLs, absolute paths, hub ids and the embedded model.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdbatch.errors import JobError
from sdbatch.job import Job
from sdbatch.job.files import NamedFile, named_files
from sdbatch.prompts.check import find_relative_picture
from sdbatch.prompts.files import local_files
from sdbatch.prompts.table import open_table
from sdbatch.storage import is_local

JOB_FILE = "job.yaml"
MAX_BYTES = 100 * 2**20  # Ray keeps these files in the memory of the cluster's head
_USE_SHARED = (
    "Put it where all machines of the cluster can read it, and name it by its URL or absolute path."
)


def check_output_path(job: Job) -> None:
    """Raise a JobError if the output would be in the job's temporary folder on the cluster."""
    if _is_relative(job.output.path):
        raise JobError(
            f"output.path = {job.output.path!r}: would be in a folder of the cluster's head that "
            f"is deleted with the job. Must be a URL, or an absolute path that all machines share: "
            f"--set output.path=s3://BUCKET/PATH."
        )


def files_to_send(job: Job) -> dict[str, Path]:
    """Return the files to send, by their paths in the job's folder on the cluster.

    Raises:
        SdbatchError: a file is missing, is outside this folder, or all together are too large.
    """
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for named in _local_files(job):
        for file in _expand(named, job):
            name = os.path.relpath(file)
            if name.startswith(".."):
                raise JobError(
                    f"{named.key} = {named.path}: must be inside this folder to be sent with the "
                    f"job. {_USE_SHARED}"
                )
            files[Path(name).as_posix()] = file
            sizes[named.key] = sizes.get(named.key, 0) + file.stat().st_size
    total = sum(sizes.values())
    if total > MAX_BYTES:
        key = max(sizes, key=lambda key: sizes[key])
        raise JobError(
            f"{key} = {sizes[key] / 2**20:,.0f} MiB of {total / 2**20:,.0f} MiB to send: a job can "
            f"send at most {MAX_BYTES // 2**20} MiB. {_USE_SHARED}"
        )
    _check_pictures(job)
    return files


def copy_files(files: Mapping[str, Path], job_file: Path, folder: Path) -> None:
    """Copy the job file and `files` into `folder`."""
    (folder / JOB_FILE).write_text(read_job_file(job_file), encoding="utf-8")
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def hash_files(files: Mapping[str, Path], job_file: Path) -> str:
    """Return the hash of the job file and `files`."""
    digest = hashlib.sha256(read_job_file(job_file).encode())
    for name, file in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def read_job_file(job_file: Path) -> str:
    """Return the text of the job file, without overrides."""
    return job_file.read_text(encoding="utf-8")


def _check_pictures(job: Job) -> None:
    """Raise a JobError if the table is sent and names pictures by relative paths, which are not."""
    paths = [path for path in job.prompts.paths if _is_relative(path)]
    if not paths and job.prompts.rows is None:
        return
    sent = job.updated(prompts=job.prompts.updated(path=paths)) if paths else job
    name = find_relative_picture(sent, open_table(sent.prompts))
    if name is not None:
        where = f"prompts.path = {paths[0]}" if paths else "prompts.rows"
        raise JobError(
            f"{where}: names the picture {name!r}, which is not sent with the job: must be one "
            f"that the cluster finds. {_USE_SHARED}"
        )


def _local_files(job: Job) -> Iterator[NamedFile]:
    """Yield the files and folders of this machine that the job names by relative paths."""
    for named in named_files(job):
        absent = named.kind.may_be_elsewhere(named.path) and not Path(named.path).exists()
        if _is_relative(named.path) and not absent:
            yield named


def _expand(named: NamedFile, job: Job) -> list[Path]:
    """Return the files behind a named file, folder or glob."""
    if named.kind.table:
        return [Path(file) for file in local_files(named.path, job.prompts.reader)]
    path = Path(named.path)
    if not path.exists():
        raise JobError(
            f"{named.key} = {named.path}: no such file here. Check the path; files with relative "
            f"paths are sent from this machine."
        )
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path, *named.kind.companions_of(path)]


def _is_relative(path: str) -> bool:
    return is_local(path) and "://" not in path and not path.startswith(("/", "~"))
