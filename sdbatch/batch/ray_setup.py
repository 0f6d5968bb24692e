"""Ray as sdbatch needs it: started or connected, quiet, its traps closed.

All settings of Ray are here, in flow.py and in pool.py, so a new version is checked there.
ARCHITECTURE.md has the measurements behind them.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdbatch.batch import pool, sessions
from sdbatch.batch.liveness import Liveness, LivenessClient
from sdbatch.batch.pool import FREE_CPUS, Machine, Machines
from sdbatch.cores import cores
from sdbatch.errors import JobError, one_line
from sdbatch.job import Job

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

CONNECT_SECONDS = 60.0
_log = logging.getLogger(__name__)
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or a warning about CUDA_VISIBLE_DEVICES
    "RAY_USAGE_STATS_ENABLED": "0",  # a job's own Ray reports to nobody
}


@contextlib.contextmanager
def connected(address: str | None, job: Job) -> Iterator[Machines]:
    """Use the Ray at `address`, at RAY_ADDRESS, or one started for this job; yield its machines.

    A Ray that the calling program has started is used and left running.

    Raises:
        JobError: no Ray answers at the address, or none can be started here.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    import ray
    from ray._private import auto_init_hook

    # From now on only ray.init starts a Ray in this process. Else a thread of Ray Data that
    # outlives its Ray starts another one with its next call, and that Ray's end ends the process.
    auto_init_hook.enable_auto_connect = False
    if ray.is_initialized():
        yield machines(job.cluster.label_selector)
        return
    over = threading.Event()
    try:
        session = _start(address, job, over)
        with sessions.marked(session) if session else contextlib.nullcontext():
            yield machines(job.cluster.label_selector)
    finally:
        ray.shutdown()
        over.set()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM act like Ctrl-C: clusters end jobs with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if before is not None:  # else it is not Python's
            signal.signal(signal.SIGTERM, before)


def machines(labels: dict[str, str]) -> Machines:
    """Return the nodes of the connected Ray; `labels` select those that may draw."""
    import ray

    return Machines(
        tuple(
            Machine(
                node["Resources"].get("CPU", 0),
                node["Resources"].get("GPU", 0),
                all(pool.selects(value, node["Labels"].get(key)) for key, value in labels.items()),
                node["Labels"].get("ray.io/accelerator-type"),
            )
            for node in ray.nodes()
            if node["Alive"]
        )
    )


def _connection_error(address: str, error: Exception) -> JobError:
    text = one_line(error, 200) or f"no answer in {CONNECT_SECONDS:.0f} s"
    if address == "local":
        return JobError(
            f"cluster.address = 'local': Ray cannot start on this machine ({text}). It needs "
            f"memory and time: run again when the machine is less busy."
        )
    return JobError(
        f"cluster.address = {address!r}: no Ray answers there ({text}). Check the address; if the "
        f"cluster has token authentication, set RAY_AUTH_MODE=token."
    )


def _start(address: str, job: Job, over: threading.Event) -> Path | None:
    """Start a Ray and return the folder of its files; or connect.

    By the name "local", or Ray reads a stale file of another Ray.

    Args:
        address: of a Ray, or "local".
        job: that it is for.
        over: set when Ray has been shut down.

    Raises:
        JobError: no Ray answers at the address, or none can be started here.
    """
    import ray

    local = address == "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if local:
        # half a second, in which Ray's processes start
        threading.Thread(target=import_module, args=("ray.data",), daemon=True).start()
        options |= {"num_cpus": _cpus(job), "include_dashboard": False}
    # In another thread: ray.init never ends if something other than Ray listens at the address,
    # and in the main thread it handles SIGTERM itself and exits silently. Ray's processes die with
    # the thread that started them.
    starting: Future[Any] = Future()

    def start() -> None:
        try:
            _check_listener(address)
            starting.set_result(ray.init(address, **options))
        except Exception as error:  # noqa: BLE001  raised again by the waiting thread
            starting.set_exception(error)
        over.wait()

    threading.Thread(target=start, daemon=True).start()
    try:
        context = starting.result(None if local else CONNECT_SECONDS)
    except KeyboardInterrupt:
        if local:  # the processes that are starting are then shut down
            wait([starting], CONNECT_SECONDS)
        raise
    except Exception as error:  # Ray's are of many kinds, bare ones among them
        raise _connection_error(address, error) from error
    if not local:
        return None
    session = Path(context.address_info["session_dir"])
    _log.info("The logs of Ray's own processes are in %s.", session / "logs")
    return session


def _check_listener(address: str) -> None:
    """Raise an OSError if nothing listens at HOST:PORT; Ray would wait for long."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _cpus(job: Job) -> int:
    """Return the CPUs of a Ray of this job's own: enough for the actors and the cheap stages."""
    each = job.cluster.cpus_per_actor or job.engine.threads
    actors = job.cluster.actors
    needed = math.ceil(actors * each) if isinstance(actors, int) else 0
    return max(cores(), needed) + FREE_CPUS


def start_liveness(actors: int) -> LivenessClient:
    """Start the run's Liveness; it takes no CPU, and Ray restarts it if its process dies.

    It is on the driver's machine: a machine that draws may disappear, and with it the deaths that
    were counted.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(
        Liveness
    )
    return LivenessClient(remote.remote(actors))


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Apply Ray Data's settings for one run; the calling program's own stay as they are."""
    from ray.data import DataContext

    from sdbatch.batch.refill import Refill

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: a block is one row, that is one shard, of any size
    context.execution_no_progress_timeout_s = -1  # it counts blocks; driver.py counts images
    context.raise_original_map_exception = True  # or sdbatch's errors arrive as text in Ray's
    context.max_consecutive_actor_init_deaths = 0  # a model that cannot be loaded ends the job
    context.custom_execution_callback_classes.append(Refill)
    # A pool grows when its actors hold as many shards as they may. By Ray's default it never does,
    # as no shard waits in front of an actor.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    with DataContext.current(context):
        yield


def blocks_of(flow: "Dataset") -> Iterator["pa.Table"]:
    """Run the data flow and yield its blocks as they come."""
    # prefetching would delay a block until the next one arrives
    yield from flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
