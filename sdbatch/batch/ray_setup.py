"""Ray as sdbatch wants it: embedded or somewhere, quiet, its traps closed.

All settings of Ray stand here and in flow.graph, so that a new version is checked in two
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
from typing import TYPE_CHECKING, Any

from sdbatch.batch import pool
from sdbatch.batch.liveness import RemoteWatch, Watch
from sdbatch.batch.metrics import Monitor
from sdbatch.batch.pool import CHEAP_CPUS, Machine, Machines
from sdbatch.cores import cores
from sdbatch.errors import JobError
from sdbatch.job import Job

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

CONNECT_SECONDS = 60.0
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or a warning about CUDA_VISIBLE_DEVICES
    "RAY_USAGE_STATS_ENABLED": "0",  # a job's own Ray reports to nobody
    # or a flow that is still ending connects again after ray.shutdown, which kills the process
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    here = threading.current_thread() is threading.main_thread()
    if started:
        try:
            _start(address, job)
        except Exception as error:  # Ray's are of many kinds, bare ones among them
            raise _why_not(address, error) from error
        if here:
            # as Ctrl-C: a job's or a machine's end comes so. Ray's own handler ends this at once
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield machines(job.cluster.label_selector)
    finally:
        if started:
            ray.shutdown()
            if here and on_sigterm is not None:
                signal.signal(signal.SIGTERM, on_sigterm)


def machines(labels: dict[str, str]) -> Machines:
    """Return the nodes of the Ray that is connected, those apart that `labels` keep out."""
    import ray

    return Machines(
        tuple(
            Machine(
                node["Resources"].get("CPU", 0),
                node["Resources"].get("GPU", 0),
                all(pool.selects(value, node["Labels"].get(key)) for key, value in labels.items()),
            )
            for node in ray.nodes()
            if node["Alive"]
        )
    )


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
    wanted = job.cluster.actors
    asked = math.ceil(wanted * each) if isinstance(wanted, int) else 0
    return max(cores(), asked) + CHEAP_CPUS


def start_watch(most: int, monitor: Monitor) -> RemoteWatch:
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
    return RemoteWatch(remote.remote(most), monitor)


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
