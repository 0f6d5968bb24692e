"""What `auto` becomes on the machines that there are."""

import pytest

from sdbatch.batch import pool
from sdbatch.batch.pool import Machine, Machines, Pool
from sdbatch.errors import JobError

CPU, GPU = Machines((Machine(2, 0),)), Machines((Machine(16, 1),))


@pytest.mark.parametrize(
    ("device", "height", "width", "lanes"),
    [
        ("cpu", 64, 64, 16),
        ("cpu", 8, 8, 16),
        ("cpu", 128, 128, 16),
        ("cpu", 256, 256, 4),
        ("cpu", 512, 512, 2),
        ("cpu", 2048, 2048, 2),
        ("cuda", 64, 64, 64),
        ("cuda", 512, 512, 32),
        ("cuda", 512, 768, 16),
        ("cuda", 1024, 1024, 8),
        ("cuda", 4096, 4096, 2),
    ],
)
def test_lanes_are_a_power_of_two_that_falls_with_the_images_size(device, height, width, lanes):
    assert pool.lanes(device, height, width) == lanes


def test_auto_is_replaced_by_what_the_machines_have(make_job):
    job = make_job(sampling={"height": 512, "width": 512})
    on_cpu, on_gpu = (pool.resolve_engine(job, machines) for machines in (CPU, GPU))
    assert on_cpu.model_dump() == {
        "device": "cpu",
        "dtype": "float32",
        "lanes": 2,
        "threads": 1,
        "channels_last": True,
        "compile": False,
    }
    assert (on_gpu.device, on_gpu.dtype, on_gpu.lanes) == ("cuda", "float16", 32)


def test_what_the_job_says_stays(make_job):
    said = {"device": "cpu", "dtype": "bfloat16", "lanes": 6, "channels_last": False}
    job = make_job(engine={**said, "compile": True, "threads": 2})
    assert pool.resolve_engine(job, GPU) == job.engine


def test_a_gpu_that_is_not_there_is_refused(make_job):
    with pytest.raises(JobError, match=r"engine.device = 'cuda': the cluster has no GPU"):
        pool.resolve_engine(make_job(engine={"device": "cuda"}), CPU)


def fitted(make_job, machines, shards=100, device="cpu", **section):
    job = make_job(cluster=section, engine={"device": device, "lanes": 2})
    return pool.fit(job.cluster, job.engine, Machines(machines), shards)


@pytest.mark.parametrize(
    ("nodes", "cpus", "fit"),
    [
        ([8], 2, 3),  # and a CPU to read and write
        ([4, 4], 2, 3),
        ([3, 3, 3], 2, 3),  # an actor stands on one node
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


def test_nodes_that_the_label_selector_keeps_out_hold_no_actor(make_job):
    machines = (Machine(8, 1, draws=False), Machine(8, 1))
    assert fitted(make_job, machines, device="cuda") == Pool(1, 1)


@pytest.mark.parametrize("nodes", [(1, 1, 1, 1), ()])
def test_an_actor_that_fits_no_node_is_refused(make_job, nodes):
    machines = tuple(Machine(n, 0) for n in nodes)
    with pytest.raises(JobError, match=r"cluster.actors = auto: .* hold 0, of 2 CPUs and 0 GPUs"):
        fitted(make_job, machines, cpus_per_actor=2)


def test_more_actors_than_fit_are_refused_with_the_way_to_a_cluster_that_grows(make_job):
    with pytest.raises(JobError, match=r"cluster.actors = 9: .*\{min: 0, max: 9\} where machines"):
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
def test_a_pool_that_grows_asks_for_no_machine_that_is_there(make_job, asked, shards, found):
    assert fitted(make_job, (), shards, device="cuda", actors=asked) == found


def test_a_gpu_may_still_come_where_the_cluster_grows(make_job):
    engine = make_job(engine={"device": "cuda"}, cluster={"actors": {"max": 4}})
    assert pool.resolve_engine(engine, CPU).dtype == "float16"


def test_what_will_come_is_not_guessed(make_job):
    job = make_job(cluster={"actors": {"max": 4}})
    with pytest.raises(JobError, match=r"engine.device = 'auto': .* has no GPU yet.*Set cuda or"):
        pool.resolve_engine(job, CPU)


@pytest.mark.parametrize(
    ("wanted", "label", "chosen"),
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
def test_labels_select_nodes_as_they_do_in_ray(wanted, label, chosen):
    assert pool.selects(wanted, label) is chosen


def test_in_flight_counts_with_the_most_lanes_of_any_gpu(make_job):
    assert pool.most_lanes(make_job(engine={"lanes": {"H100": 64, "T4": 16}}).engine) == 64
    assert pool.most_lanes(make_job(engine={"lanes": 8}).engine) == 8


def test_an_actor_stands_only_where_the_label_selector_lets_it(make_job):
    labels = {"ray.io/accelerator-type": "in(A100,H100)"}
    job = make_job(cluster={"cpus_per_actor": 2, "label_selector": labels})
    assert pool.options(job.cluster, job.engine) == {
        "num_cpus": 2,
        "num_gpus": 0,
        "label_selector": labels,
    }
    assert "label_selector" not in pool.options(make_job().cluster, job.engine)
