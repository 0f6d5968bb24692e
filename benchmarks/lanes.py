"""How many lanes draw fastest, by image size and memory layout: the rule of engine/limits.py.

    python benchmarks/lanes.py [--model tiny] [--device cpu] [--dtype bfloat16]

Times one UNet call of random weights for 2 to 64 lanes at several sizes. Prints milliseconds a lane
and the fewest lanes within 10 % of the fastest, as fewer lanes stay fuller when a job ends; JSON on
the last line.
"""

from pathlib import Path
from typing import Any

import click
import models
import torch
from findings import report
from sides import model_ms

from sdbatch.models.build import Build
from sdbatch.models.sd1.loading import assemble

LANES = (2, 4, 8, 16, 32, 64)
MOST_SECONDS = 2.0  # of one call; more lanes than take so long are not tried


def sweep(name: str, build: Build, pixels: int) -> dict[str, float]:
    """Return the milliseconds a lane by the number of lanes."""
    model = assemble(models.parts(name, build.device, getattr(torch, build.dtype)), build)
    found: dict[str, float] = {}
    for lanes in LANES:
        ms, _ = model_ms(model, lanes, 1, pixels)
        found[str(lanes)] = round(ms, 3)
        if ms * lanes > 1000 * MOST_SECONDS:
            break
    return found


@click.command(help=__doc__)
@click.option("--model", "names", multiple=True, type=click.Choice(models.NAMES))
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--pixels", multiple=True, type=int, help="Default: 64 to 512.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(
    names: tuple[str, ...], device: str, dtype: str, pixels: tuple[int, ...], output: Path | None
) -> None:
    """Time lanes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in names or ("tiny", models.EMBEDDED):
        for side in pixels or (64, 128, 256, 512):
            for channels_last in (False, True):
                row = sweep(name, Build(device, dtype, channels_last), side)
                fastest = min(row.values())
                best = next(lanes for lanes, ms in row.items() if ms <= 1.1 * fastest)
                layout = "NHWC" if channels_last else "NCHW"
                found[f"{name} {side} {layout}"] = {"ms_a_lane": row, "best": int(best)}
                cells = "  ".join(f"{lanes}: {ms:.2f}" for lanes, ms in row.items())
                print(f"{name:9} {side:4} {layout}  {cells}  best {best}", flush=True)
    report(output, device=device, dtype=dtype, threads=1, found=found)


if __name__ == "__main__":
    main()
