"""Ray as sdbatch wants it: embedded or somewhere, quiet, its traps closed, and what fits on it.

All settings of Ray stand here and in pipeline.graph, so that a new version is checked in two
places. The measurements behind them are in ARCHITECTURE.md.
"""

import contextlib
import math
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdbatch.cores import cores
from sdbatch.errors import JobError
from sdbatch.job import Cluster, EngineSettings, Job
from sdbatch.watch import RemoteWatch, Watch

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

CHEAP_CPUS = 1  # kept free on a cluster for reading, writing and the watch
READ_CPUS, WRITE_CPUS = 0.25, 0.5  # unequal, or Ray fuses neighbours into one task
CONNECT_SECONDS = 60.0
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or a warning about CUDA_VISIBLE_DEVICES
    "RAY_USAGE_STATS_ENABLED": "0",  # a job's own Ray reports to nobody
}


@dataclass(frozen=True)
class Machines:
    """What the cluster has in all."""

    cpus: float
    gpus: float


@contextlib.contextmanager
def connected(address: str | None, job: Job) -> Iterator[Machines]:
    """Use the Ray at `address`, at RAY_ADDRESS, or one started for this job; yield what it has.

    A Ray that the caller's program had started already is used and left running.

    Raises:
        JobError: no Ray answers at the address, or none can be started here.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            _start(address, job)
        except Exception as error:  # Ray's are of many kinds, bare ones among them
            raise _why_not(address, error) from error
    try:
        yield machines()
    finally:
        if started:
            ray.shutdown()


def machines() -> Machines:
    """Return what the Ray that is connected has."""
    import ray

    found = ray.cluster_resources()
    return Machines(found.get("CPU", 0), found.get("GPU", 0))


def _why_not(address: str, error: Exception) -> JobError:
    text = " ".join(str(error).split())[:200] or f"nothing in {CONNECT_SECONDS:.0f} s"
    if address == "local":
        return JobError(
            f"cluster.address = 'local': Ray cannot start on this machine ({text}): there must "
            f"be memory and time for it. Run again when the machine is less busy."
        )
    return JobError(
        f"cluster.address = {address!r}: no Ray answers there ({text}). Check the address; "
        f"where the cluster has token authentication, set RAY_AUTH_MODE=token."
    )


def _start(address: str, job: Job) -> None:
    """Start a Ray ("local", by name: else a stale file of another Ray is picked up) or connect."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        ray.init("local", num_cpus=_cpus(job), include_dashboard=False, **quiet)
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    # Beside this thread, as ray.init tries for ever where something else than Ray listens.
    connecting: Future[Any] = Future()

    def connect() -> None:
        try:
            connecting.set_result(ray.init(address, **quiet))
        except Exception as error:  # noqa: BLE001  raised again by the waiting thread
            connecting.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    connecting.result(timeout=CONNECT_SECONDS)


def _cpus(job: Job) -> int:
    """Return how many CPUs an own Ray is told it has: room for the actors and the cheap stages."""
    each = job.cluster.cpus_per_actor or job.engine.threads
    asked = 0 if job.cluster.actors == "auto" else math.ceil(job.cluster.actors * each)
    return max(cores(), asked) + CHEAP_CPUS


def resolve_engine(job: Job, machines: Machines) -> EngineSettings:
    """Replace every `auto` by what the machines have."""
    engine = job.engine
    device = engine.device
    if device == "auto":
        device = "cuda" if machines.gpus else "cpu"
    if device == "cuda" and not machines.gpus:
        raise JobError("engine.device = 'cuda': the cluster has no GPU. Set cpu, or give it one.")
    chosen = {
        "device": device,
        "dtype": "float16" if device == "cuda" else "float32",
        "lanes": lanes(device, job.sampling.height, job.sampling.width),
        "channels_last": True,
        "compile": False,
    }
    left = {name: value for name, value in chosen.items() if getattr(engine, name) == "auto"}
    return engine.model_copy(update=left)


def lanes(device: str, height: int, width: int) -> int:
    """Return how many lanes draw fastest: a power of two, fewer for larger images.

    On a CPU by benchmarks/lanes.py: large images gain nothing from a batch. Of small ones 32 lanes
    would be 7 to 17 % faster than 16, but 16 stay fuller as a job ends. On a GPU 32 of 512x512 keep
    it busy by arithmetic and leave room in its memory: not measured yet.
    """
    at_512, most = (32, 64) if device == "cuda" else (1, 16)
    fitting = at_512 * 512 * 512 / (height * width)
    return max(2, min(most, 1 << int(math.log2(max(2, fitting)))))


def actors(cluster: Cluster, engine: EngineSettings, machines: Machines, shards: int) -> int:
    """Return how many actors draw: as many as fit, or as asked, but not more than shards.

    Raises:
        JobError: those asked for, or a single one, do not fit the cluster.
    """
    cpus, gpus = per_actor(cluster, engine)
    fit = int((machines.cpus - CHEAP_CPUS) / cpus) if cpus else math.inf
    if gpus:
        fit = min(fit, int(machines.gpus / gpus))
    wanted = 1 if cluster.actors == "auto" else cluster.actors
    if fit < wanted:
        raise JobError(
            f"cluster.actors = {cluster.actors}: the cluster's {machines.cpus:g} CPUs and "
            f"{machines.gpus:g} GPUs hold {fit}, of {cpus:g} CPUs and {gpus:g} GPUs each, with "
            f"{CHEAP_CPUS} CPU left for reading and writing. Set fewer, or smaller ones."
        )
    return int(min(fit if cluster.actors == "auto" else wanted, shards))


def per_actor(cluster: Cluster, engine: EngineSettings) -> tuple[float, float]:
    """Return the CPUs and GPUs that a drawing actor takes."""
    cpus = cluster.cpus_per_actor
    return cpus or engine.threads, cluster.gpus_per_actor if engine.device == "cuda" else 0


def in_flight(actors: int, shards: int, images: int, lanes: int) -> int:
    """Return how many shards an actor draws at a time.

    Two at least, so that the engine never waits between shards; more where shards are small, so
    that there is a choice of requests to fill lanes with; fewer where that would leave another
    actor without.
    """
    fill = math.ceil(4 * lanes / max(1, images // shards))
    return max(1, min(max(2, fill), shards // actors))


def start_watch(actors: int) -> RemoteWatch:
    """Start the run's Watch; it takes no CPU, and a new one takes over if its process dies."""
    import ray

    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Watch)
    return RemoteWatch(remote.remote(actors))


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Lay out a data flow with Ray Data's settings for one run, leaving the program's own alone."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # one block is one shard, of any size
    context.execution_no_progress_timeout_s = -1  # it counts blocks; driver.py watches images
    context.raise_original_map_exception = True  # or ours arrives as text inside Ray's
    context.max_consecutive_actor_init_deaths = 0  # a model that cannot be loaded ends the job
    with DataContext.current(context):
        yield


def blocks_of(flow: "Dataset") -> Iterator["pa.Table"]:
    """Run the data flow and yield its blocks as they come."""
    # prefetch would hold a block back until the next one is there
    yield from flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
