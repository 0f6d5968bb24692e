"""Where a run of the chaos suite draws: into a folder or S3, with its own Ray or a cluster."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import Cluster, find
from tests.chaos.engine import COUNT
from tests.chaos.store import FaultyStore, download, faulty_s3
from tests.ray.processes import marked, processes, ray_files
from tests.stores.servers import Place as Bucket
from tests.stores.servers import s3_settings

IMAGES, IMAGES_PER_SHARD = 160, 4
FAILING = {37: "fail", 111: "die by SIGSEGV"}  # rows that cannot be drawn
ROOT = Path(__file__).parents[2]


@dataclass
class Place:
    """One output, what can be broken around it, and how its command is started."""

    folder: Path  # for files of the suite
    ray: Path  # Ray's files
    output: str  # a folder or a URL
    job: Path
    cluster: Cluster | None
    bucket: Bucket | None
    proxy: FaultyStore | None

    @property
    def count(self) -> Path:
        """The file with a byte for each image that was ever drawn."""
        return self.folder / "count"

    def start(self, name: str, *options: str) -> subprocess.Popen:
        """Start the command; its messages go to the file `name`."""
        command = [sys.executable, "-m", "tests.chaos.command", "run", str(self.job)]
        with (self.folder / name).open("w") as out:
            return subprocess.Popen(
                [*command, "--set", f"output.path={self.output}", *options],
                env=self.environment(),
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )

    def environment(self) -> dict[str, str]:
        """Return the environment of a run, and of the nodes of its cluster."""
        settings = {COUNT: str(self.count), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        if self.cluster is not None:
            settings["RAY_ADDRESS"] = self.cluster.address
        if self.proxy is not None:
            settings |= s3_settings(self.proxy.address)
        return {**marked(self.ray), **settings}

    def receipts(self) -> set[str]:
        """Return the names of the receipts that are there."""
        if self.bucket is None:
            return set(os.listdir(f"{self.output}/receipts")) if self._has("receipts") else set()
        return {key for key in self.bucket.keys("out") if key.startswith("receipts/")}

    def _has(self, name: str) -> bool:
        return os.path.isdir(f"{self.output}/{name}")

    def local_copy(self) -> Path:
        """Return the output as a local folder."""
        if self.bucket is None:
            return Path(self.output)
        copy = self.folder / "copy"
        download(self.bucket, self.output, copy)
        return copy

    def find(self, *words: str) -> int | None:
        """Return a process of this place with one of `words` in its command."""
        return find(f"RAY_TMPDIR={self.ray}", *words)

    def kill_all(self) -> None:
        """End every process that was started here."""
        for pid in processes(f"RAY_TMPDIR={self.ray}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _heed_interrupts() -> None:
    """A shell lets what it starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def new_place(
    folder: Path, *, on_s3: bool = False, on_cluster: bool = False, **output: str
) -> Iterator[Place]:
    """Make a place with a job of its own; `output` are keys of that section."""
    folder.mkdir()
    rows = [FAILING.get(row, f"a dog, number {row}") for row in range(IMAGES)]
    (folder / "prompts.txt").write_text("\n".join(rows) + "\n")
    keys = "".join(f", {key}: {value}" for key, value in output.items())
    job = folder / "job.yaml"
    job.write_text(
        f"prompts: {{path: {folder}/prompts.txt}}\n"
        "model: builtin:shapes\n"
        "sampling: {height: 8, width: 8, num_inference_steps: 2}\n"
        "engine: {device: cpu, dtype: float32, lanes: 4}\n"
        "cluster: {actors: 2, cpus_per_actor: 1}\n"
        f"output: {{path: replaced, images_per_shard: {IMAGES_PER_SHARD}{keys}}}\n"
    )
    with ray_files() as ray:
        place = Place(folder, ray, str(folder / "out"), job, None, None, None)
        try:
            if on_s3:
                with faulty_s3() as (bucket, proxy):
                    place.output, place.bucket, place.proxy = f"{bucket.url}/out", bucket, proxy
                    yield from _with_cluster(place, on_cluster)
            else:
                yield from _with_cluster(place, on_cluster)
        finally:
            place.kill_all()


def _with_cluster(place: Place, on_cluster: bool) -> Iterator[Place]:
    if on_cluster:
        place.cluster = Cluster(place.ray, place.environment())
        place.cluster.start()
    yield place
