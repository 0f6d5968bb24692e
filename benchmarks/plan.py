"""What `sdbatch plan` costs over a table, without --check and with it, and what wide rows cost.

    python benchmarks/plan.py [--rows 1000000] [--wide 32]

A Parquet table of prompts with an id, a seed, steps and a guidance scale. Each command runs in a
process of its own; `cpu_s` is its user and system time, `peak_mib` its largest resident memory (the
kernel's VmHWM: the peak of getrusage would include that of the process that started it).
`wide` reads, draws with an engine that draws at once, and writes a shard whose rows have a binary
column of 100 KB each; `growth_mib` is the peak above the memory before. JSON on the last line.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from findings import report

PLAN = """
import atexit, sys
atexit.register(lambda: print(open("/proc/self/status").read(), file=sys.stderr))
from sdbatch.cli import main
main()
"""
SIDE = 64  # pixels
BLOB = 100_000  # bytes


def write_job(folder: Path, rows: pa.Table, columns: str, image_format: str = "parquet") -> Path:
    """Write a table and the job over it; return the job's path."""
    pq.write_table(rows, folder / "table.parquet", row_group_size=100_000)
    path = folder / "job.yaml"
    path.write_text(
        f"prompts: {{path: {folder / 'table.parquet'}, columns: {columns}}}\n"
        f"model: builtin:shapes\n"
        f"sampling: {{height: {SIDE}, width: {SIDE}}}\n"
        f"output: {{path: {folder / 'out'}, format: {image_format}}}\n"
    )
    return path


def prompts(rows: int) -> pa.Table:
    """Return a table of prompts, all different, with values of their own."""
    random = np.random.default_rng(0)
    return pa.table(
        {
            "id": np.arange(rows),
            "prompt": [f"a photo of a dog, number {i}, in the snow, detailed" for i in range(rows)],
            "seed": random.integers(0, 2**32, rows),
            "steps": random.integers(10, 50, rows),
            "cfg": random.choice([5.0, 7.5, 10.0], rows),
        }
    )


def memory(status: str, key: str) -> float:
    """Return a figure of /proc/PID/status in MiB."""
    return int(re.findall(rf"^{key}:\s*(\d+) kB", status, re.M)[-1]) / 1024


def measure_plan(job: Path, *options: str) -> dict[str, Any]:
    """Run `sdbatch plan` and return what it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", PLAN, "plan", str(job), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    check = json.loads(done.stdout)["check"]
    return {
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(cpu, 2),
        "rows": check["rows"],
        "rows_per_s": round(check["rows_per_s"]),
        "rows_per_cpu_s": round(check["rows"] / cpu),
        "peak_mib": round(memory(done.stderr, "VmHWM")),
    }


def measure_wide(folder: Path, rows: int, file_format: str) -> dict[str, Any]:
    """Return the memory of one process that draws and writes a shard with a large column."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # of the repository, for tests
    from sdbatch.job import load
    from tests.finished import finish

    blobs = [np.random.default_rng(i).bytes(BLOB) for i in range(rows)]
    table = pa.table({"prompt": [f"a dog {i}" for i in range(rows)], "blob": blobs})
    del blobs
    for name, part in (("first", table.slice(0, 1)), ("all", table)):  # the first imports
        where = folder / name
        where.mkdir()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = memory(Path("/proc/self/status").read_text(), "VmRSS")
        finish(load(write_job(where, part, "{}", file_format)))
    peak = memory(Path("/proc/self/status").read_text(), "VmHWM")
    return {
        "format": file_format,
        "rows": rows,
        "blob_mib": round(rows * BLOB / 2**20, 1),
        "growth_mib": round(peak - before, 1),
        "peak_mib": round(peak),
    }


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--wide", default=32, show_default=True, help="Rows with a column of 100 KB.")
@click.option("--wide-format", hidden=True, help="Measure one format in this process.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the JSON goes too.")
def main(rows: int, wide: int, wide_format: str | None, output: Path | None) -> None:
    """Measure, print, and end with JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wide_format is not None:
            print(json.dumps(measure_wide(folder, wide, wide_format)))
            return
        columns = "{id: id, num_inference_steps: steps, guidance_scale: cfg}"
        job = write_job(folder, prompts(rows), columns)
        found: dict[str, Any] = {
            "plan": measure_plan(job),
            "check": measure_plan(job, "--check"),
        }
    for each in ("parquet", "webdataset"):
        command = [sys.executable, __file__, "--wide", str(wide), "--wide-format", each]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"wide {each}"] = json.loads(done.stdout.splitlines()[-1])
    for name, values in found.items():
        print(name.ljust(16), ", ".join(f"{key} {value}" for key, value in values.items()))
    report(output, rows=rows, found=found)


if __name__ == "__main__":
    main()
