"""How many actors draw, on which nodes, and how many shards each holds.

Plain arithmetic over what Ray reports of its nodes; ARCHITECTURE.md has the measurements behind it.
"""

import math
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import JobError
from sdbatch.job import Cluster, Growing, Job
from sdbatch.resolve import EngineConfig
from sdbatch.stages.base import Needs

FREE_CPUS = 1  # of a cluster, for reading, writing and liveness


@dataclass(frozen=True)
class Machine:
    """What a node of the cluster has in all."""

    cpus: float
    gpus: float
    draws: bool = True  # cluster.label_selector admits actors
    gpu_type: str | None = None  # Ray's name of it, such as H100


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

    @property
    def gpu_types(self) -> set[str]:
        """Return the types of the GPUs that may draw; of those that Ray does not name, none."""
        return {node.gpu_type for node in self.nodes if node.draws and node.gpus and node.gpu_type}


@dataclass(frozen=True)
class Pool:
    """How many actors draw: `least` stay while there is work, up to `most` are requested."""

    least: int
    most: int


def fit(cluster: Cluster, actor: Needs, machines: Machines, shards: int) -> Pool:
    """Return how many actors draw: as many as fit or as the job sets, but not more than shards.

    Args:
        cluster: of the job.
        actor: from `needs`.
        machines: of the cluster.
        shards: to draw.

    Raises:
        JobError: they, or a single one, do not fit a cluster that does not grow.
    """
    actors = cluster.actors
    if isinstance(actors, Growing):
        return Pool(min(max(1, actors.min), shards), min(actors.max, shards))
    most = _count_fitting(machines, actor.cpus, actor.gpus)
    least = 1 if actors == "auto" else actors
    if most < least:
        raise JobError(
            f"cluster.actors = {actors}: must be at most {most}: an actor takes {actor.cpus:g} "
            f"CPUs and {actor.gpus:g} GPUs of the cluster's {machines.cpus:g} CPUs and "
            f"{machines.gpus:g} GPUs, and {FREE_CPUS} CPU stays free for reading and writing. Set "
            f"fewer or smaller actors, or {{min: 0, max: {least}}} on a cluster that grows."
        )
    number = min(most if actors == "auto" else least, shards)
    return Pool(number, number)


def _count_fitting(machines: Machines, cpus: float, gpus: float) -> int:
    """Return how many actors the nodes hold, each on one node, with FREE_CPUS left free."""
    fit = 0
    for node in machines.nodes:
        if node.draws:
            fit += int(min(node.cpus / cpus, node.gpus / gpus if gpus else math.inf))
    return max(0, min(fit, int((machines.cpus - FREE_CPUS) / cpus)))


def needs(job: Job, engine: EngineConfig, machines: Machines) -> Needs:
    """Return what a drawing actor needs."""
    cluster = job.cluster
    gpus = cluster.gpus_per_actor if engine.device == "cuda" else 0
    cpus = cluster.cpus_per_actor
    if cpus is None:
        cpus = _cpus_with_gpu(job, machines) if gpus else engine.threads
    return Needs(cpus, gpus, cluster.label_selector)


def _cpus_with_gpu(job: Job, machines: Machines) -> int:
    """Return the CPUs that the image format needs, or as many as do not keep an actor waiting."""
    cluster, most = job.cluster, job.output.encoder.cpus
    if isinstance(cluster.actors, Growing):
        return most
    wanted = _count_fitting(machines, 1, cluster.gpus_per_actor)
    if cluster.actors != "auto":
        wanted = min(wanted, cluster.actors)
    for cpus in range(most, 1, -1):
        if wanted and _count_fitting(machines, cpus, cluster.gpus_per_actor) >= wanted:
            return cpus
    return 1


def cpus_note(job: Job, actor: Needs) -> str | None:
    """Return what to say if the nodes have fewer CPUs for a GPU than the image format needs."""
    most = job.output.encoder.cpus
    if job.cluster.cpus_per_actor is not None or not actor.gpus or actor.cpus >= most:
        return None
    return (
        f"cluster.cpus_per_actor = {actor.cpus:g}, not {most}, because the nodes have no more CPUs "
        f"for each GPU. If GPUs wait for {job.output.image_format} files, use nodes with more CPUs "
        f"or another output.image_format."
    )


def ray_options(needs: Needs) -> dict[str, Any]:
    """Return the needs of a stage as Ray's options."""
    labels = {"label_selector": dict(needs.labels)} if needs.labels else {}
    return {"num_cpus": needs.cpus, "num_gpus": needs.gpus, **labels}


def in_flight(actors: int, shards: int, images: int, lanes: int) -> int:
    """Return how many shards an actor draws at a time.

    At least two, so that the engine never waits between shards; more if shards are small, for a
    choice of requests to fill lanes with; fewer if another actor would have none.
    """
    fill = math.ceil(4 * lanes / max(1, images // shards))
    return max(1, min(max(2, fill), shards // actors))


def selects(selector: str, label: str | None) -> bool:
    """Tell whether a node's label matches a selector of Ray's: x, !x, in(x,y) or !in(x,y)."""
    names = selector.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
    return (label in [name.strip() for name in names]) != selector.startswith("!")
