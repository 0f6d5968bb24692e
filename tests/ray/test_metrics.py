"""What Prometheus finds on a node after a run, and what the logs of its workers hold."""

import re
import time
import urllib.request
from pathlib import Path

import ray

from tests.fakes import FakeEngine

WAIT_SECONDS = 60.0  # Ray reports every ten seconds


class Working(FakeEngine):
    """A fake engine that says how much work it had."""

    def _draw(self, request):
        usage = self.usage
        usage.seconds += 0.5
        usage.idle_seconds += 0.125
        usage.rows += 4
        usage.filled += 3
        return super()._draw(request)


def scrape():
    """Return the metrics of the node: name -> tags -> value."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^ray_sdbatch_(\w+)\{(.*)\} (\S+)$", text, re.M):
        values = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if values["dataset"] == "counted":
            kind = values.get("outcome") or values.get("stage")
            key = name, kind
            found[key] = found.get(key, 0) + float(value) * ("bucket" not in name)
    return found


def test_prometheus_finds_what_a_run_did_and_logs_tell_of_each_shard(draw, make_job, prompts):
    table = prompts(*["a dog"] * 9, "fail")
    job = make_job(
        name="counted", prompts={"path": table}, output={"images_per_shard": 2},
        cluster={"actors": 1},
    )  # fmt: skip
    report = draw(job, make_engine=Working)
    assert (report.images, report.failed) == (9, 1)
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := scrape()).get(("stage_seconds_count", "write")) != 5:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert found["images_total", "drawn"] == 9
    assert found["images_total", "failed"] == 1
    assert found["ticks_total", None] == 10
    assert found["engine_seconds_total", None] == 5.0
    assert found["engine_idle_seconds_total", None] == 1.25
    assert (found["lanes_total", None], found["lanes_filled_total", None]) == (40, 30)
    assert found["queue", None] == 0
    assert found["images_planned", None] == 10
    assert {found["stage_seconds_count", stage] for stage in ("read", "draw", "write")} == {5}

    logs = Path(ray.worker.global_worker.node.get_session_dir_path()) / "logs"
    text = "".join(file.read_text() for file in logs.glob("worker-*.err"))
    for stage in ("read", "draw", "write"):
        assert re.search(rf"shard 000003 {stage}: begun", text)
        assert re.search(rf"shard 000003 {stage}: ended after \d+\.\d\d s", text)
