"""Does Ray's object store spill to the disk when writing is far slower than drawing?

    python benchmarks/spill.py [--shards 80] [--store 300] [--output benchmarks/results/spill.json]

An engine whose images are ready at once, a writer that waits a second before every shard, and an
object store that holds only a part of the images: drawing must wait for writing. Prints the most
that the store held and how much was spilled; JSON on the last line.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import findings
import pyarrow as pa
from pipeline import ReadyEngine, write_table

from sdbatch.batch import flow, pipeline
from sdbatch.job import parse
from sdbatch.output.progress import Progress
from sdbatch.report.progress import SilentDisplay
from sdbatch.stages.write import WriteShard

SHARD = 200  # images
WAIT_SECONDS = 1.0


class SlowWrite(WriteShard):
    """Waits before it writes a shard."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Wait, then write."""
        time.sleep(WAIT_SECONDS)
        return super().__call__(rows)


class StoreGauge(SilentDisplay):
    """Reads the object store during the run."""

    def __init__(self) -> None:
        self.held = 0
        self.spilled = 0
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        """Take a reading every half second."""
        if time.monotonic() > self._next:
            self._next = time.monotonic() + 0.5
            stats = store_stats()
            self.held = max(self.held, stats.object_store_bytes_used)
            self.spilled = stats.spilled_bytes_total


def store_stats() -> Any:
    """Return Ray's statistics of the object store of this machine."""
    import ray
    from ray._private import internal_api

    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return internal_api.get_memory_info_reply(state).store_stats


@click.command()
@click.option("--shards", default=80, show_default=True)
@click.option("--store", "mib", default=300, show_default=True, help="MiB of the object store.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(shards: int, mib: int, output: Path | None) -> None:
    """Measure whether the object store spills."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    ray.init("local", num_cpus=4, object_store_memory=mib * 2**20, **quiet)
    flow.WriteShard = SlowWrite  # type: ignore[attr-defined]
    gauge = StoreGauge()
    with tempfile.TemporaryDirectory() as name:
        write_table(Path(name) / "table.parquet", shards * SHARD)
        job = parse(
            {
                "prompts": {"path": f"{name}/table.parquet"},
                "model": "builtin:shapes",
                "sampling": {"height": 512, "width": 512},
                "cluster": {"actors": 2, "cpus_per_actor": 1},
                "output": {"path": f"{name}/out", "images_per_shard": SHARD},
            }
        )
        ready = pipeline.prepare(job)
        report = pipeline.draw(ready, display=gauge, make_engine=ReadyEngine)
        size = sum(file.stat().st_size for file in Path(name, "out", "data").iterdir())
    if report.images != shards * SHARD:
        raise click.ClickException(f"{report.images} images: {report.stopped}")
    ray.shutdown()
    figures = {
        "shards": shards,
        "store_mib": mib,
        "images_mib": round(size / 2**20),
        "file_kib": round(size / 1024 / (shards * SHARD), 1),  # of an image, with its row
        "held_at_most_mib": round(gauge.held / 2**20),
        "spilled_mib": round(gauge.spilled / 2**20, 1),
        "seconds": report.seconds,
    }
    for key, value in figures.items():
        print(f"{key:18} {value}")
    findings.report(output, **figures)


if __name__ == "__main__":
    main()
