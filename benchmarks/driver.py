"""The cost of a run for its driver: shards of one image, and an engine that draws nothing.

    python benchmarks/driver.py [--shards 100000 --shards 1000000] [--seconds 300]

For each number of planned shards: planning, the time to the first receipt, the driver's CPU and
memory for each drawn shard, and those of Ray's own processes on the head; a run that takes longer
than --seconds of drawing is interrupted. Then, for up to MOST_RESUMED shards, the time in which the
same command finds out that one shard is left, with receipts of all others; receipts of shards that
were not drawn are copies. Prints Markdown and, on the last line, JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import findings
import numpy as np
from pipeline import ReadyEngine, TimeLimit, write_table

from sdbatch.batch import pipeline
from sdbatch.cores import cores
from sdbatch.job import Job, parse
from sdbatch.output import identity, names, receipts
from sdbatch.output.progress import Progress
from sdbatch.output.record import require_record
from sdbatch.storage import Store

ACTORS = 2
MOST_RESUMED = 100_000  # more receipts fill a disk with small files
SMALLEST = np.zeros((8, 8, 3), np.uint8)  # image


class Gauge(TimeLimit):
    """Reads the cost of the driver and of Ray's processes every two seconds of drawing."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def show(self, progress: Progress) -> None:
        """Take a reading if one is due, and interrupt the run when its time is over."""
        if progress.done and time.time() > self.last.get("at", 0) + 2:
            self.last = {"at": time.time(), "done": progress.done, **read_processes()}
            self.first = self.first or self.last
        super().show(progress)


def read_processes() -> dict[str, float]:
    """Return CPU seconds and MiB of this process and of Ray's own processes on this machine."""
    readings = {"cpu": time.process_time(), "mib": _mib(os.getpid())}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            if name in ("gcs_server", "raylet"):
                clock = (process / "stat").read_text().rpartition(")")[2].split()
                readings[f"{name}_cpu"] = sum(map(int, clock[11:13])) / os.sysconf("SC_CLK_TCK")
                readings[f"{name}_mib"] = _mib(int(process.name))
        except OSError:
            continue  # it has ended meanwhile
    return readings


def _mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def job(folder: Path) -> Job:
    """Return the job over the table in `folder`, with a shard for each image."""
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
    """Plan `shards` shards and draw as many as time allows; return the cost."""
    write_table(folder / "table.parquet", shards)
    began = time.time()
    ready = pipeline.prepare(job(folder))
    planned = time.time() - began
    gauge = Gauge(seconds)
    report = pipeline.draw(ready, display=gauge, make_engine=partial(ReadyEngine, SMALLEST))
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
    """Return the cost of finding out which shard is left, with receipts of all but the last."""
    store = Store(str(folder / "out"))
    record = require_record(store)
    one = receipts.proved(store, record.proof())[0]
    committed = receipts.committed_shards(store)
    for shard in record.planned():
        if shard.shard in committed:
            continue
        name = names.data_file(shard.shard, "parquet")
        copy = replace(
            one,
            shard=shard.shard,
            fingerprint=identity.shard_fingerprint(record.fingerprint, shard),
            files=[replace(one.files[0], name=name)],
        )
        if not os.path.exists(store.path(name)):  # a file of the same size, which takes no room
            os.link(store.path(one.files[0].name), store.path(name))
        receipt = Path(store.path(names.receipt_file(shard.shard)))
        receipt.write_text(json.dumps(asdict(copy), indent=1))
    store.remove(names.receipt_file(shards - 1))
    began, cpu = time.time(), time.process_time()
    work = pipeline.find_work(pipeline.prepare(job(folder)))
    if [shard.shard for shard in work.todo] != [shards - 1]:
        raise RuntimeError(f"{len(work.todo)} shards are left to draw")
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
@click.option("--part", type=(str, int, str), hidden=True)  # part, shards, folder: one process each
def main(
    shards: tuple[int, ...],
    seconds: float,
    folder: Path | None,
    output: Path | None,
    part: tuple[str, int, str] | None,
) -> None:
    """Measure the cost of a run for its driver."""
    if part:
        step, count, where = part
        at = Path(where)
        print(json.dumps(resume(count, at) if step == "resume" else measure(count, at, seconds)))
        return
    result = findings.Findings(output)
    result.add("on", {"date": time.strftime("%Y-%m-%d"), "cores": cores(), **_versions()})
    rows = {}
    for count in shards:
        where = tempfile.mkdtemp(dir=folder)
        rows[f"{count:,} shards"] = _part("run", count, where, seconds)
        result.add("driver", rows)
        if count <= MOST_RESUMED:
            rows[f"{count:,} shards"] |= _part("resume", count, where, seconds)
            result.add("driver", rows)
        shutil.rmtree(where)
    print(json.dumps(result.values))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sdbatch", "ray", "pyarrow")}


def _part(step: str, shards: int, folder: str, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", step, str(shards), folder]
    command += ["--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
