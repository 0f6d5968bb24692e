"""How many actors draw, where, and with how many lanes: what `auto` becomes on what is there.

Plain arithmetic over what Ray says of its nodes; the measurements behind it are in ARCHITECTURE.md.
"""

import math
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import JobError
from sdbatch.job import Cluster, EngineSettings, Growing, Job

CHEAP_CPUS = 1  # kept free on a cluster for reading, writing and the watch
READ_CPUS, WRITE_CPUS = 0.26, 0.5  # no neighbour's number, or Ray fuses the two into one task
CUT_CPUS = 0.01  # it may wait for long, with the rest of a window, and must keep none from working
WINDOW = 64  # shards of the plan that go to Ray as one block: a block each takes it long to begin


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


def fit(cluster: Cluster, engine: EngineSettings, machines: Machines, shards: int) -> Pool:
    """Return how many actors draw: as many as fit, or as asked, but not more than shards.

    Raises:
        JobError: those asked for, or a single one, do not fit a cluster that does not grow.
    """
    asked = cluster.actors
    if isinstance(asked, Growing):
        return Pool(min(max(1, asked.min), shards), min(asked.max, shards))
    cpus, gpus = per_actor(cluster, engine)
    most = _fitting(machines, cpus, gpus)
    wanted = 1 if asked == "auto" else asked
    if most < wanted:
        raise JobError(
            f"cluster.actors = {asked}: the cluster's {machines.cpus:g} CPUs and "
            f"{machines.gpus:g} GPUs hold {most}, of {cpus:g} CPUs and {gpus:g} GPUs each, with "
            f"{CHEAP_CPUS} CPU left for reading and writing. Set fewer, or smaller ones; or "
            f"{{min: 0, max: {wanted}}} where machines come when they are asked for."
        )
    number = min(most if asked == "auto" else wanted, shards)
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


def options(cluster: Cluster, engine: EngineSettings) -> dict[str, Any]:
    """Return what Ray is told of a drawing actor: what it takes, and where it may stand."""
    cpus, gpus = per_actor(cluster, engine)
    labels = cluster.label_selector
    return {"num_cpus": cpus, "num_gpus": gpus, **({"label_selector": labels} if labels else {})}


def in_flight(actors: int, shards: int, images: int, lanes: int) -> int:
    """Return how many shards an actor draws at a time.

    Two at least, so that the engine never waits between shards; more where shards are small, so
    that there is a choice of requests to fill lanes with; fewer where that would leave another
    actor without.
    """
    fill = math.ceil(4 * lanes / max(1, images // shards))
    return max(1, min(max(2, fill), shards // actors))


def selects(wanted: str, label: str | None) -> bool:
    """Tell whether a node's label is as wanted: x, !x, in(x,y) or !in(x,y), as Ray reads them."""
    names = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
    return (label in [name.strip() for name in names]) != wanted.startswith("!")
