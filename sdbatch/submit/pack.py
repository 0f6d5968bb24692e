"""What goes along with a job: its file, and the files here that it names by relative paths.

URLs, absolute paths, hub ids and the embedded model are the cluster's own to find.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdbatch.errors import JobError
from sdbatch.job import Job
from sdbatch.prompts import table
from sdbatch.storage import is_local

JOB_FILE = "job.yaml"
MOST_BYTES = 100 * 2**20  # Ray keeps what goes along in the memory of the cluster's head
_SHARED = "Put it where all machines of the cluster can read it, and name it by URL or whole path."


def refuse_lost_output(job: Job) -> None:
    """Raise a JobError where the output would lie in the job's own folder on the cluster."""
    if _is_relative(job.output.path):
        raise JobError(
            f"output.path = {job.output.path!r}: would lie in a folder of the cluster's head that "
            f"goes with the job. Must be a URL, or a whole path that all its machines share: "
            f"--set output.path=s3://BUCKET/PATH."
        )


def contents(job: Job) -> dict[str, Path]:
    """Return the files that go along, by their paths in the job's folder on the cluster.

    Raises:
        SdbatchError: one is not there, is not below this folder, or they are too large.
    """
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for key, path in _named(job):
        for file in _files(key, path):
            name = os.path.relpath(file)
            if name.startswith(".."):
                raise JobError(
                    f"{key} = {path}: must be below this folder to go along with the job. {_SHARED}"
                )
            files[Path(name).as_posix()] = file
            sizes[key] = sizes.get(key, 0) + file.stat().st_size
    if sum(sizes.values()) > MOST_BYTES:
        key = max(sizes, key=lambda key: sizes[key])
        raise JobError(
            f"{key} = {sizes[key] / 2**20:,.0f} MiB of files: at most {MOST_BYTES // 2**20} MiB go "
            f"along with a job. {_SHARED}"
        )
    return files


def copy(files: Mapping[str, Path], job_file: Path, folder: Path) -> None:
    """Lay the job file and `files` into `folder`."""
    (folder / JOB_FILE).write_text(text(job_file), encoding="utf-8")
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def digest(files: Mapping[str, Path], job_file: Path) -> str:
    """Return the hash of all that goes along."""
    found = hashlib.sha256(text(job_file).encode())
    for name, file in sorted(files.items()):
        found.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def text(job_file: Path) -> str:
    """Return the job file as it stands."""
    return job_file.read_text(encoding="utf-8")


def _named(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the key and the path of each file or folder here that the job names."""
    model = job.model
    beside = [("model.loras", lora.path) for lora in model.loras]
    beside += [("model.embeddings", embedding.path) for embedding in model.embeddings]
    beside += [("model.vae", model.vae)] if model.vae else []
    if job.safety.checker not in ("auto", "none"):
        beside.append(("safety.checker", job.safety.checker))
    for key, path in (("model.path", model.path), ("model.config", model.config)):
        if Path(path).exists():  # else a hub's id, or built in
            beside.append((key, path))
    for key, path in [*(("prompts.path", path) for path in job.prompts.paths), *beside]:
        if _is_relative(path):
            yield key, path


def _files(key: str, path: str) -> list[Path]:
    if key == "prompts.path":
        return [Path(url) for url in table.find([path]).values()]
    here = Path(path)
    if not here.exists():
        raise JobError(f"{key} = {path}: no such file here, and a relative path goes along.")
    return sorted(p for p in here.rglob("*") if p.is_file()) if here.is_dir() else [here]


def _is_relative(path: str) -> bool:
    return is_local(path) and "://" not in path and not path.startswith(("/", "~"))
