"""What a run costs its driver: shards of one image, and an engine that draws nothing.

    python benchmarks/driver.py [--shards 100000 --shards 1000000] [--seconds 300]

For each number of planned shards: planning, the time to the first receipt, the driver's CPU and
memory for each shard that is drawn, those of Ray's own processes on the head; a run that is not
over after --seconds of drawing is cut off. Then, up to RESUMED shards, how long the same command
takes, over receipts of all shards but one, to find out that this one is left; those not drawn are
copies of one that was. Prints Markdown and, on the last line, JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import click
import findings
import numpy as np
from pipeline import EndsSoon, write_table

from sdbatch.batch import pipeline
from sdbatch.engine.request import Drawn, Request, Usage
from sdbatch.job import Job, parse
from sdbatch.output import receipts
from sdbatch.report.progress import Progress
from sdbatch.storage import Store

ACTORS = 2
RESUMED = 100_000  # at most: more receipts than that fill a disk with small files


class NullEngine:
    """An engine whose smallest image is ready before it is asked for."""

    def __init__(self) -> None:
        self.usage = Usage()
        blank = np.zeros((8, 8, 3), np.uint8)
        self._drawn = Drawn(image=blank, prompt_tokens=1, prompt_truncated=False, lanes=2)

    def submit(self, request: Request) -> Future[Drawn]:
        """Return the ready image."""
        self.usage.ticks += 1
        future: Future[Drawn] = Future()
        future.set_result(self._drawn)
        return future


class Gauge(EndsSoon):
    """Reads the driver and Ray's processes every two seconds of drawing, and ends it in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def show(self, progress: Progress) -> None:
        """Take a reading if it is due, and end the run when its time is over."""
        if progress.done and time.time() > self.last.get("at", 0) + 2:
            self.last = {"at": time.time(), "done": progress.done, **readings()}
            self.first = self.first or self.last
        super().show(progress)


def readings() -> dict[str, float]:
    """Return CPU seconds and MiB of this process and of Ray's own processes on this machine."""
    found = {"cpu": time.process_time(), "mib": _mib(os.getpid())}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            if name in ("gcs_server", "raylet"):
                clock = (process / "stat").read_text().rpartition(")")[2].split()
                found[f"{name}_cpu"] = sum(map(int, clock[11:13])) / os.sysconf("SC_CLK_TCK")
                found[f"{name}_mib"] = _mib(int(process.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def _mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def job(folder: Path) -> Job:
    """Return the job over the table in `folder`, a shard an image."""
    return parse(
        {
            "prompts": {"path": str(folder / "table.parquet")},
            "model": "builtin:shapes",
            "sampling": {"height": 8, "width": 8},
            "cluster": {"actors": ACTORS, "cpus_per_actor": 0.3},
            "output": {"path": str(folder / "out"), "images_per_shard": 1},
        }
    )


def measure(shards: int, folder: Path, seconds: float) -> dict[str, float]:
    """Draw of `shards` shards as many as time allows; return what it cost."""
    write_table(folder / "table.parquet", shards)
    began = time.time()
    ready = pipeline.prepare(job(folder))
    planned = time.time() - began
    gauge = Gauge(seconds)
    report = pipeline.draw(ready, display=gauge, make_engine=NullEngine)
    if report.stopped not in (None, "interrupted"):
        raise RuntimeError(f"{report.images} of {shards}: {report.stopped}")
    first, last = gauge.first, gauge.last
    done, took = last["done"] - first["done"], last["at"] - first["at"]
    found = {
        "drawn": report.images,
        "plan_s": round(planned, 2),
        "first_receipt_s": report.startup.get("shard", float("nan")),
        "shards_per_s": round(done / took, 1),
        "driver_cpu_ms_a_shard": round(1000 * (last["cpu"] - first["cpu"]) / done, 2),
        "driver_mib_at_first": round(first["mib"]),
        "driver_mib_at_last": round(last["mib"]),
        "driver_kib_a_shard": round(1024 * (last["mib"] - first["mib"]) / done, 1),
    }
    for name in ("gcs_server", "raylet"):
        found[f"{name}_cpu_ms_a_shard"] = round(
            1000 * (last[f"{name}_cpu"] - first[f"{name}_cpu"]) / done, 2
        )
        found[f"{name}_mib"] = round(last[f"{name}_mib"])
    return found


def resume(shards: int, folder: Path) -> dict[str, float]:
    """Return what it takes to find out what is left to do, over all receipts but the last."""
    store = Store(str(folder / "out"))
    known = sorted(receipts.committed(store))
    one = json.loads(store.read(receipts.path(known[0])))
    data = store.path(one["files"][0]["name"])
    for shard in sorted(set(range(shards)) - set(known)):
        name = f"{receipts.DATA}/{shard:06d}.parquet"
        said = {**one, "shard": shard, "files": [{**one["files"][0], "name": name}]}
        if not os.path.exists(store.path(name)):
            os.link(data, store.path(name))  # a file of the same size, which takes no room
        Path(store.path(receipts.path(shard))).write_text(json.dumps(said, indent=1))
    store.remove(receipts.path(shards - 1))
    began, cpu = time.time(), time.process_time()
    ready = pipeline.prepare(job(folder))
    if [shard.shard for shard in ready.todo] != [shards - 1]:
        raise RuntimeError(f"{len(ready.todo)} shards are left to draw")
    return {
        "resume_s": round(time.time() - began, 2),
        "resume_cpu_s": round(time.process_time() - cpu, 2),
        "resume_mib": round(_mib(os.getpid())),
    }


@click.command()
@click.option("--shards", multiple=True, type=int, default=(100_000, 1_000_000), show_default=True)
@click.option("--seconds", default=300.0, show_default=True, help="Of drawing, at most.")
@click.option("--folder", type=click.Path(path_type=Path), help="For the outputs; default: /tmp.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
@click.option("--part", type=(str, int, str), hidden=True)  # what, shards, folder: one process each
def main(
    shards: tuple[int, ...],
    seconds: float,
    folder: Path | None,
    output: Path | None,
    part: tuple[str, int, str] | None,
) -> None:
    """Measure what a run costs its driver."""
    if part:
        what, count, where = part
        at = Path(where)
        print(json.dumps(resume(count, at) if what == "resume" else measure(count, at, seconds)))
        return
    result = findings.Findings(output)
    result.add("on", {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **_versions()})
    rows = {}
    for count in shards:
        where = tempfile.mkdtemp(dir=folder)
        rows[f"{count:,} shards"] = _part("run", count, where, seconds)
        result.add("driver", rows)
        if count <= RESUMED:
            rows[f"{count:,} shards"] |= _part("resume", count, where, seconds)
            result.add("driver", rows)
        shutil.rmtree(where)
    print(json.dumps(result.values))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sdbatch", "ray", "pyarrow")}


def _part(what: str, shards: int, folder: str, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", what, str(shards), folder]
    command += ["--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
