"""What `auto` becomes on the machines that there are."""

import pytest

from sdbatch import cluster
from sdbatch.cluster import Machine, Machines
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
    assert cluster.lanes(device, height, width) == lanes


def test_auto_is_replaced_by_what_the_machines_have(make_job):
    job = make_job(sampling={"height": 512, "width": 512})
    on_cpu, on_gpu = (cluster.resolve_engine(job, machines) for machines in (CPU, GPU))
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
    assert cluster.resolve_engine(job, GPU) == job.engine


def test_a_gpu_that_is_not_there_is_refused(make_job):
    with pytest.raises(JobError, match=r"engine.device = 'cuda': the cluster has no GPU"):
        cluster.resolve_engine(make_job(engine={"device": "cuda"}), CPU)


def test_a_machine_too_busy_for_a_ray_is_told_of_in_one_line(make_job, monkeypatch):
    def too_slow(*_, **__):
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", too_slow)
    with (
        pytest.raises(JobError, match=r"cannot start on this machine \(.* timed out .* less busy"),
        cluster.connected(None, make_job()),
    ):
        pass
