"""What a run leaves of Ray in the program that calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import functools, json, threading
import ray  # before the run, which can then set no variable that Ray reads at its import
import ray.data
from sdbatch.batch import pipeline
from sdbatch.job import parse
from sdbatch.report.progress import SilentDisplay
from tests.fakes import FakeEngine

starts, start_ray = [], ray.init

def record(*arguments, **options):
    starts.append(threading.current_thread().name)
    return start_ray(*arguments, **options)

class Interrupts(SilentDisplay):
    def show(self, progress):
        if progress.done:
            raise KeyboardInterrupt

ray.init = record
job = parse({
    "prompts": {"rows": [{"prompt": f"dog {i}"} for i in range(200)]},
    "model": "builtin:shapes",
    "sampling": {"height": 64, "width": 64},
    "cluster": {"actors": 1},
    "output": {"path": "out", "images_per_shard": 20},
})
engine = functools.partial(FakeEngine, 0.05)
report = pipeline.draw(pipeline.prepare(job), display=Interrupts(), make_engine=engine)
for thread in set(threading.enumerate()) - {threading.current_thread()}:
    thread.join(20)
print(json.dumps([report.stopped, len(starts)]))
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get(ray.remote(lambda: "the program's own Ray").remote()))
"""


def test_no_thread_that_outlives_an_interrupted_run_starts_a_ray(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    state, own = done.stdout.splitlines()
    assert json.loads(state) == ["interrupted", 1]
    assert own == "the program's own Ray"
