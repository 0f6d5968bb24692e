"""A cluster that has no GPU until a job asks for it: Ray's own autoscaler, over nodes it makes up.

The GPUs are a number that the nodes claim; the engine that takes them is the fake one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray._private import services
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from sdbatch.batch import pipeline
from sdbatch.report.progress import SilentDisplay
from tests.fakes import FakeEngine
from tests.wait import wait_until

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
MOST = 2  # nodes
LISTS = (  # keys of the launcher's configuration that must be there
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Start the cluster: a head without a GPU, and up to MOST nodes of one GPU each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{services.get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "growing",
        "max_workers": MOST,
        "provider": {
            # its own name for it wants a file that Ray's package does not have
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST,
            },
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in LISTS},
    }
    file = tmp_path_factory.mktemp("growing") / "config.json"
    file.write_text(json.dumps(config))
    start = [str(BIN / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--block"]
    said = file.with_name("said.txt")
    with said.open("w") as out:
        head = subprocess.Popen(
            [*start, f"--autoscaling-config={file}", "--include-dashboard=false"],
            env={
                **os.environ,
                "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=out,
            start_new_session=True,
        )
    wait_until(lambda: "will now block" in said.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address, log_to_driver=False, logging_level="error")
        yield
        ray.shutdown()
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def gpus():
    return int(sum(n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"]))


class Counting(SilentDisplay):
    """Counts the cluster's GPUs, and those that are taken, as the run goes on."""

    def __init__(self):
        self.there, self.taken = [], []

    def show(self, progress):
        here = gpus()
        self.there.append(here)
        self.taken.append((progress.done, here - int(ray.available_resources().get("GPU", 0))))


class Slow(FakeEngine):
    """Takes its time, and a long time for the last shard."""

    def _draw(self, request):
        time.sleep(6 if request.prompt == "slow" else 0.3)
        return super()._draw(request)


def test_machines_come_for_a_job_and_go_as_it_runs_out_of_work(growing, make_job, tmp_path):
    table = tmp_path / "t.txt"
    table.write_text("a dog\n" * 40 + "slow\n" * 2)
    job = make_job(
        prompts={"path": str(table)},
        engine={"device": "cuda", "dtype": "float16", "lanes": 2},
        cluster={"actors": {"min": 0, "max": 4}, "cpus_per_actor": 1},
        output={"images_per_shard": 2},
    )
    assert gpus() == 0
    seen = Counting()
    report = pipeline.draw(pipeline.prepare(job), display=seen, make_engine=Slow)
    assert (report.images, report.stopped) == (42, None)
    assert (seen.there[0], max(seen.there)) == (0, MOST)
    assert seen.taken[-1][1] <= 1  # the last shard's alone: no GPU is held by those who wait
    wait_until(lambda: gpus() == 0)
