"""Ray as sdbatch wants it: embedded or somewhere, quiet, its traps closed, and what fits on it.

All settings of Ray stand here and in pipeline.graph, so that a new version is checked in two
places. The measurements behind them are in ARCHITECTURE.md.
"""

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdbatch.cores import cores
from sdbatch.errors import JobError
from sdbatch.job import Cluster, EngineSettings, Growing, Job
from sdbatch.monitor import Monitor
from sdbatch.watch import RemoteWatch, Watch

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

CHEAP_CPUS = 1  # kept free on a cluster for reading, writing and the watch
READ_CPUS, WRITE_CPUS = 0.26, 0.5  # no neighbour's number, or Ray fuses the two into one task
CUT_CPUS = 0.01  # it may wait for long, with the rest of a window, and must keep none from working
WINDOW = 64  # shards of the plan that go to Ray as one block: a block each takes it 1.5 ms to begin
CONNECT_SECONDS = 60.0
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or a warning about CUDA_VISIBLE_DEVICES
    "RAY_USAGE_STATS_ENABLED": "0",  # a job's own Ray reports to nobody
}


@dataclass(frozen=True)
class Machine:
    """What a node of the cluster has in all."""

    cpus: float
    gpus: float
    draws: bool = True  # cluster.label_selector lets actors on it


@dataclass(frozen=True)
class Machines:
    """The nodes of the cluster."""

    nodes: tuple[Machine, ...]

    @property
    def cpus(self) -> float:
        """Return the CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Return the GPUs of the nodes that may draw."""
        return sum(node.gpus for node in self.nodes if node.draws)


@dataclass(frozen=True)
class Pool:
    """How many actors draw: `least` are kept as long as there is work, up to `most` asked for."""

    least: int
    most: int


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
        if threading.current_thread() is threading.main_thread():
            # as Ctrl-C: a job's or a machine's end comes so. Ray's own handler ends this at once
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield machines(job.cluster.label_selector)
    finally:
        if started:
            ray.shutdown()


def machines(selector: dict[str, str]) -> Machines:
    """Return the nodes of the Ray that is connected, those apart that `selector` keeps out."""
    import ray

    return Machines(
        tuple(
            Machine(
                node["Resources"].get("CPU", 0),
                node["Resources"].get("GPU", 0),
                all(selects(value, node["Labels"].get(key)) for key, value in selector.items()),
            )
            for node in ray.nodes()
            if node["Alive"]
        )
    )


def selects(wanted: str, label: str | None) -> bool:
    """Tell whether a node's label is as wanted: x, !x, in(x,y) or !in(x,y), as Ray reads them."""
    names = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
    return (label in [name.strip() for name in names]) != wanted.startswith("!")


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
    actors = job.cluster.actors
    asked = math.ceil(actors * each) if isinstance(actors, int) else 0
    return max(cores(), asked) + CHEAP_CPUS


def resolve_engine(job: Job, machines: Machines) -> EngineSettings:
    """Replace every `auto` by what the machines have."""
    engine = job.engine
    device = engine.device
    grows = isinstance(job.cluster.actors, Growing)
    if device == "auto":
        if grows and not machines.gpus:
            raise JobError(
                "engine.device = 'auto': the cluster, which is to grow, has no GPU yet, and what "
                "will come cannot be seen. Set cuda or cpu."
            )
        device = "cuda" if machines.gpus else "cpu"
    if device == "cuda" and not machines.gpus and not grows:
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


def most_lanes(engine: EngineSettings) -> int:
    """Return the lanes of a resolved engine, of the GPU with most where there are several types."""
    return max(engine.lanes.values()) if isinstance(engine.lanes, dict) else int(engine.lanes)


def pool(cluster: Cluster, engine: EngineSettings, machines: Machines, shards: int) -> Pool:
    """Return how many actors draw: as many as fit, or as asked, but not more than shards.

    Raises:
        JobError: those asked for, or a single one, do not fit a cluster that does not grow.
    """
    asked = cluster.actors
    if isinstance(asked, Growing):
        return Pool(min(max(1, asked.min), shards), min(asked.max, shards))
    cpus, gpus = per_actor(cluster, engine)
    fit = _fitting(machines, cpus, gpus)
    wanted = 1 if asked == "auto" else asked
    if fit < wanted:
        raise JobError(
            f"cluster.actors = {asked}: the cluster's {machines.cpus:g} CPUs and "
            f"{machines.gpus:g} GPUs hold {fit}, of {cpus:g} CPUs and {gpus:g} GPUs each, with "
            f"{CHEAP_CPUS} CPU left for reading and writing. Set fewer, or smaller ones; or "
            f"{{min: 0, max: {wanted}}} where machines come when they are asked for."
        )
    number = min(fit if asked == "auto" else wanted, shards)
    return Pool(number, number)


def _fitting(machines: Machines, cpus: float, gpus: float) -> int:
    """Return how many actors the nodes hold, an actor on one node each, CHEAP_CPUS left free."""
    fit = 0
    for node in machines.nodes:
        if node.draws:
            fit += int(min(node.cpus / cpus, node.gpus / gpus if gpus else math.inf))
    return max(0, min(fit, int((machines.cpus - CHEAP_CPUS) / cpus)))


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


def start_watch(actors: int, monitor: Monitor) -> RemoteWatch:
    """Start the run's Watch; it takes no CPU, and a new one takes over if its process dies.

    It lives on the driver's machine: one of those that draw may be taken away, and with it the
    deaths that the Watch has counted.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(
        Watch
    )
    return RemoteWatch(remote.remote(actors), monitor)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Lay out a data flow with Ray Data's settings for one run, leaving the program's own alone."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: a block is one row, which is one shard, of any size
    context.execution_no_progress_timeout_s = -1  # it counts blocks; driver.py watches images
    context.raise_original_map_exception = True  # or ours arrives as text inside Ray's
    context.max_consecutive_actor_init_deaths = 0  # a model that cannot be loaded ends the job
    # A pool that grows does so when its actors hold what they may; by Ray's default never, as
    # none of ours waits in front of an actor.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    with DataContext.current(context):
        yield


def blocks_of(flow: "Dataset") -> Iterator["pa.Table"]:
    """Run the data flow and yield its blocks as they come."""
    # prefetch would hold a block back until the next one is there
    yield from flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
