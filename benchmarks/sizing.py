"""From images wanted and a GPU to GPUs, hours, disk, network, money: cluster/SIZING.md's tables.

    python benchmarks/sizing.py --images 1000000 --gpu L4 --gpus 64 --price 0.25
    python benchmarks/sizing.py --page       # writes the tables of cluster/SIZING.md anew

All is arithmetic, by the formulas of cluster/SIZING.md. Measured here is only what
benchmarks/results/driver.json says of the driver, and spill.json of the size of an image's file. A
GPU's images/s is its published peak times --efficiency, a prediction of benchmarks/roofline.py.
When benchmarks/gpu.py has measured it, give it as --rate.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import click

from sdbatch.output.plan import MOST_IMAGES

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "cluster" / "SIZING.md"
BEGIN, END = "<!-- sizing: {} -->\n", "<!-- end -->\n"
# Published peak, dense, in float16 with tensor cores: TFLOP/s (NVIDIA's data sheets).
PEAK = {"T4": 65, "L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 989}
UNET_TFLOP = 0.8033  # a lane and step of Stable Diffusion 1.5 at 512x512
VAE_TFLOP = 2.514  # a decoded image at 512x512
EAGER_SHARE = 0.27  # of the peak, predicted: benchmarks/roofline.py
REQUESTS = 4  # of an object store, a shard: data, receipt, and both listed and read once more


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn, and on what."""

    images: int
    gpu: str
    gpus: int
    steps: int = 25
    guided: bool = True
    pixels: int = 512 * 512
    efficiency: float = EAGER_SHARE  # of the published peak
    rate: float | None = None  # images/s of one GPU, where measured
    price: float = 0.0  # of one GPU and hour, in any currency
    spot_loss: float = 0.0  # machines lost, a GPU and hour
    start: float = 300.0  # seconds from a machine's request to its first image


@dataclass(frozen=True)
class Size:
    """What it takes."""

    tflop: float  # an image
    rate: float  # images/s of one GPU
    hours: float
    money: float
    lost: float  # part of the work that lost machines take with them
    file_kib: float  # of an image
    disk_gb: float
    network_mb: float  # per second, into the object store
    shards: int
    shard_seconds: float  # on one GPU
    driver_cores: float
    driver_gib: float
    requests: int  # of the object store


def size(wanted: Wanted) -> Size:
    """Work out what `wanted` takes."""
    scale = wanted.pixels / 512**2
    lanes = 2 if wanted.guided else 1
    tflop = scale * (lanes * wanted.steps * UNET_TFLOP + VAE_TFLOP)
    rate = wanted.rate or PEAK[wanted.gpu] * wanted.efficiency / tflop
    file_bytes = scale * 1024 * json.loads((RESULTS / "spill.json").read_text())["file_kib"]
    shards = math.ceil(wanted.images / MOST_IMAGES)
    shard_seconds = MOST_IMAGES / rate
    lost = wanted.spot_loss / 3600 * (shard_seconds + wanted.start)  # two in flight, half done each
    seconds = wanted.images / (rate * wanted.gpus) * (1 + lost) + wanted.start
    driver = Driver.measured()
    return Size(
        tflop=tflop,
        rate=rate,
        hours=seconds / 3600,
        money=seconds / 3600 * wanted.gpus * wanted.price,
        lost=lost,
        file_kib=file_bytes / 1024,
        disk_gb=wanted.images * file_bytes / 1e9,
        network_mb=rate * wanted.gpus * file_bytes / 1e6,
        shards=shards,
        shard_seconds=shard_seconds,
        driver_cores=rate * wanted.gpus / MOST_IMAGES * driver.cpu(shards) / 1000,
        driver_gib=driver.gib(shards),
        requests=shards * REQUESTS,
    )


@dataclass(frozen=True)
class Driver:
    """What benchmarks/driver.py found, at plans of a hundred thousand and a million shards."""

    cpu_ms: float  # a shard, of a plan of a hundred thousand
    most_cpu_ms: float  # a shard, of a plan of a million
    base_mib: float  # with no shard
    planned_kib: float  # a shard of the plan
    drawn_kib: float  # a shard that was drawn, in addition
    resume_ms: float  # a receipt
    resume_kib: float  # a receipt, with all that the process holds besides

    @classmethod
    def measured(cls) -> "Driver":
        """Read the results."""
        found = json.loads((RESULTS / "driver.json").read_text())["driver"]
        few, many = found["100,000 shards"], found["1,000,000 shards"]
        planned = (many["driver_mib_at_first"] - few["driver_mib_at_first"]) * 1024 / 900_000
        return cls(
            cpu_ms=few["driver_cpu_ms_a_shard"],
            most_cpu_ms=many["driver_cpu_ms_a_shard"],
            base_mib=few["driver_mib_at_first"] - 100_000 * planned / 1024,
            planned_kib=planned,
            drawn_kib=few["driver_kib_a_shard"],
            resume_ms=1000 * few["resume_s"] / 100_000,
            resume_kib=1024 * few["resume_mib"] / 100_000,
        )

    def cpu(self, shards: int) -> float:
        """Return the milliseconds of a core that a shard takes, in a plan of so many."""
        return self.cpu_ms if shards <= 100_000 else self.most_cpu_ms

    def gib(self, shards: int) -> float:
        """Return the driver's memory when so many shards are drawn."""
        return (self.base_mib + shards * (self.planned_kib + self.drawn_kib) / 1024) / 1024


def table(rows: list[tuple[str, Wanted]]) -> str:
    """Return the sizes as a Markdown table."""
    lines = [
        "| | GPUs | images/s, one GPU | hours | money | lost to spot | disk | network | shards "
        "| driver |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, wanted in rows:
        s = size(wanted)
        lines.append(
            f"| {name} | {wanted.gpus} {wanted.gpu} | {s.rate:.1f} | {s.hours:,.1f} | "
            f"{s.money:,.0f} | {s.lost:.1%} | {s.disk_gb:,.0f} GB | {s.network_mb:,.0f} MB/s | "
            f"{s.shards:,} of {s.shard_seconds:,.0f} s | {s.driver_cores:.2f} cores, "
            f"{s.driver_gib:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return cluster/SIZING.md with its tables worked out anew."""
    text = PAGE.read_text()
    for name, body in (("examples", examples()), ("limits", limits())):
        before, begin, rest = text.partition(BEGIN.format(name))
        if not begin:
            raise click.ClickException(f"{PAGE} = no table {name}: must have its marks.")
        text = before + begin + body + END + rest.partition(END)[2]
    return text


def examples() -> str:
    """Return the table of examples. Prices are examples, too."""
    rows = [
        ("10,000 images", Wanted(10_000, "L4", 1, price=0.8)),
        ("1,000,000", Wanted(1_000_000, "L4", 64, price=0.8)),
        ("1,000,000, spot", Wanted(1_000_000, "L4", 64, price=0.3, spot_loss=0.05)),
        ("1,000,000, 8 steps", Wanted(1_000_000, "L4", 16, steps=8, price=0.8)),
        ("100,000,000", Wanted(100_000_000, "H100", 128, price=3.0)),
        ("1,000,000,000", Wanted(1_000_000_000, "H100", 512, price=3.0)),
    ]
    return table(rows)


def limits() -> str:
    """Return what the driver takes at 10^7 to 10^9 images, a thousand a shard."""
    driver = Driver.measured()
    lines = [
        "| images | shards | driver CPU in total | driver memory at the end | resume |",
        "|---|---|---|---|---|",
    ]
    for power in (7, 8, 9):
        shards = 10**power // MOST_IMAGES
        lines.append(
            f"| 10^{power} | {shards:,} | {shards * driver.cpu(shards) / 3.6e6:.2f} h of a core | "
            f"{driver.gib(shards):.1f} GiB | {shards * driver.resume_ms / 1000:,.0f} s, "
            f"{shards * driver.resume_kib / 2**20:.1f} GiB |"
        )
    lines += [
        "",
        f"A shard takes {driver.cpu_ms:.0f} ms of one core of the driver, or "
        f"{driver.most_cpu_ms:.0f} ms in a plan of a million shards. It takes "
        f"{driver.planned_kib:.1f} KiB of memory when it is planned, and "
        f"{driver.drawn_kib:.1f} KiB more when it is drawn. A resume reads a receipt in "
        f"{driver.resume_ms:.2f} ms from a local disk. One core of such a driver is enough for "
        f"{1000 / driver.cpu_ms * MOST_IMAGES:,.0f} images/s, or for "
        f"{1000 / driver.most_cpu_ms * MOST_IMAGES:,.0f} in a plan of a million shards.",
    ]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--images", type=int)
@click.option("--gpu", type=click.Choice(list(PEAK)), default="L4", show_default=True)
@click.option("--gpus", default=1, show_default=True)
@click.option("--steps", default=25, show_default=True)
@click.option("--guided/--unguided", default=True, show_default=True)
@click.option("--pixels", default=512 * 512, show_default=True, help="An image: height x width.")
@click.option("--efficiency", default=EAGER_SHARE, show_default=True, help="Of the published peak.")
@click.option("--rate", type=float, help="Images/s of one GPU, measured; in place of the peak.")
@click.option("--price", default=0.0, help="Of one GPU and hour.")
@click.option("--spot-loss", default=0.0, help="Machines lost, a GPU and hour.")
@click.option("--page", "write", is_flag=True, help="Write the tables of cluster/SIZING.md anew.")
def main(images: int | None, write: bool, **wanted: float) -> None:
    """Work out what a dataset takes."""
    if write:
        PAGE.write_text(page())
    if images is not None:
        print(table([(f"{images:,} images", Wanted(images=images, **wanted))]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
