"""How many actors draw, and on which nodes."""

import pytest

from sdbatch.batch import pool
from sdbatch.batch.pool import Machine, Machines, Pool
from sdbatch.errors import JobError
from sdbatch.resolve import ANY_GPU, EngineConfig


def engine_config(device="cpu", lanes=2):
    return EngineConfig(device, "float32", {ANY_GPU: lanes}, 1, channels_last=True, compile=False)


def fitted(make_job, machines, shards=100, device="cpu", **section):
    job, machines = make_job(cluster=section), Machines(machines)
    actor = pool.needs(job, engine_config(device), machines)
    return pool.fit(job.cluster, actor, machines, shards)


@pytest.mark.parametrize(
    ("nodes", "cpus", "fit"),
    [
        ([8], 2, 3),  # and a CPU to read and write
        ([4, 4], 2, 3),
        ([3, 3, 3], 2, 3),  # an actor needs all of it on one node
        ([1, 16], 2, 8),
        ([2], 0.25, 4),
    ],
)
def test_as_many_actors_draw_as_the_nodes_hold_one_by_one(make_job, nodes, cpus, fit):
    machines = tuple(Machine(n, 0) for n in nodes)
    assert fitted(make_job, machines, cpus_per_actor=cpus) == Pool(fit, fit)


@pytest.mark.parametrize(("gpus", "fit"), [(1, 6), (0.5, 12), (2, 2), (4, 1)])
def test_gpus_are_shared_or_taken_by_several_on_their_own_node(make_job, gpus, fit):
    machines = (Machine(4, 0), Machine(32, 4), Machine(32, 1), Machine(32, 1))
    found = fitted(make_job, machines, device="cuda", cpus_per_actor=1, gpus_per_actor=gpus)
    assert found == Pool(fit, fit)


def test_nodes_that_the_label_selector_excludes_hold_no_actor(make_job):
    machines = (Machine(8, 1, draws=False), Machine(8, 1))
    assert fitted(make_job, machines, device="cuda") == Pool(1, 1)


@pytest.mark.parametrize("nodes", [(1, 1, 1, 1), ()])
def test_an_actor_that_fits_no_node_is_an_error(make_job, nodes):
    machines = tuple(Machine(n, 0) for n in nodes)
    with pytest.raises(
        JobError, match=r"cluster.actors = auto: must be at most 0: .* 2 CPUs and 0 GPUs"
    ):
        fitted(make_job, machines, cpus_per_actor=2)


def test_more_actors_than_fit_are_an_error_that_names_a_growing_cluster(make_job):
    with pytest.raises(
        JobError, match=r"cluster.actors = 9: must be at most 7: .*\{min: 0, max: 9\} on a"
    ):
        fitted(make_job, (Machine(8, 0),), actors=9)


@pytest.mark.parametrize(
    ("asked", "shards", "found"),
    [
        ({"min": 0, "max": 64}, 100, Pool(1, 64)),
        ({"min": 8, "max": 64}, 100, Pool(8, 64)),
        ({"min": 8, "max": 64}, 5, Pool(5, 5)),
        ({"max": 4}, 100, Pool(1, 4)),
    ],
)
def test_a_growing_pool_does_not_depend_on_the_present_machines(make_job, asked, shards, found):
    assert fitted(make_job, (), shards, device="cuda", actors=asked) == found


@pytest.mark.parametrize(
    ("selector", "label", "selected"),
    [
        ("H100", "H100", True),
        ("H100", "A100", False),
        ("H100", None, False),
        ("!H100", "H100", False),
        ("!H100", None, True),
        ("in(A100, H100)", "H100", True),
        ("in(A100,H100)", "T4", False),
        ("!in(A100,H100)", "T4", True),
        ("!in(A100,H100)", "A100", False),
    ],
)
def test_labels_select_nodes_as_they_do_in_ray(selector, label, selected):
    assert pool.selects(selector, label) is selected


def test_an_actor_runs_only_where_the_label_selector_admits_it(make_job):
    labels = {"ray.io/accelerator-type": "in(A100,H100)"}
    job = make_job(cluster={"cpus_per_actor": 2, "label_selector": labels})
    assert pool.ray_options(pool.needs(job, engine_config(), Machines(()))) == {
        "num_cpus": 2,
        "num_gpus": 0,
        "label_selector": labels,
    }
    actor = pool.needs(make_job(), engine_config(), Machines(()))
    assert "label_selector" not in pool.ray_options(actor)


GPU_NODE = Machine(64, 4)  # with many CPUs


def actor_of(make_job, *nodes, device="cuda", image_format="jpg", **cluster):
    job = make_job(cluster=cluster, output={"image_format": image_format})
    actor = pool.needs(job, engine_config(device), Machines(nodes))
    return actor, pool.cpus_note(job, actor)


@pytest.mark.parametrize(("image_format", "cpus"), [("jpg", 2), ("png", 4), ("webp", 4)])
def test_an_actor_with_a_gpu_has_the_cpus_that_its_image_format_needs(make_job, image_format, cpus):
    actor, note = actor_of(make_job, GPU_NODE, image_format=image_format)
    assert (actor.cpus, note) == (cpus, None)


def test_an_actor_on_a_cpu_has_the_cpus_of_its_threads(make_job):
    actor, note = actor_of(make_job, GPU_NODE, device="cpu", image_format="png")
    assert (actor.cpus, actor.gpus, note) == (1, 0, None)


@pytest.mark.parametrize(
    ("nodes", "cpus"),
    [
        ([Machine(4, 1)], 3),  # a CPU stays free
        ([Machine(3, 1)], 2),
        ([Machine(8, 8)], 1),
        ([Machine(64, 4), Machine(2, 1)], 2),  # the smallest node draws, too
        ([Machine(1, 1)], 1),
    ],
)
def test_few_cpus_for_a_gpu_keep_no_actor_from_starting_and_are_noted(make_job, nodes, cpus):
    actor, note = actor_of(make_job, *nodes, image_format="png")
    assert actor.cpus == cpus
    assert note.startswith(f"cluster.cpus_per_actor = {cpus}, not 4, because the nodes have no")


def test_fewer_actors_than_gpus_have_more_cpus_each(make_job):
    assert actor_of(make_job, Machine(8, 8), image_format="png", actors=1)[0].cpus == 4


def test_a_growing_cluster_has_the_default_as_its_future_nodes_are_unknown(make_job):
    actor, note = actor_of(make_job, Machine(2, 1), image_format="png", actors={"max": 4})
    assert (actor.cpus, note) == (4, None)


def test_cpus_that_the_job_sets_are_kept_without_a_note(make_job):
    actor, note = actor_of(make_job, Machine(4, 1), image_format="png", cpus_per_actor=0.5)
    assert (actor.cpus, note) == (0.5, None)


def test_the_types_of_gpus_are_those_of_nodes_that_may_draw():
    nodes = (
        Machine(8, 1, gpu_type="H100"),
        Machine(8, 4, gpu_type="H100"),
        Machine(8, 1, draws=False, gpu_type="T4"),
        Machine(8, 0, gpu_type="L4"),
        Machine(8, 1),
    )
    assert Machines(nodes).gpu_types == {"H100"}
