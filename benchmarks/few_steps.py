"""What a guidance interval in sigma saves and costs, on builtin:shapes, as the judge reads it.

    python benchmarks/few_steps.py --output benchmarks/results/few_steps

Draws the same held-out prompts and seeds with guidance at all noise levels, in several intervals of
sigma, and without guidance. For each: how much of what the prompts name the pictures show, PSNR to
guidance at all levels, the share of denoiser rows, and images for each second of CPU time. Every
way draws a part of the prompts in turn, so that a busy machine slows all of them alike. The sampler
for distilled models, lcm, is drawn too: with this model, which is none. Prints a table and JSON.
"""

import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from fidelity import SIDE, WHOLE, Caption, load_model, prompts, rates
from findings import Findings, versions

from sdbatch.cores import cores
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.sd1.family import StableDiffusion1

GUIDANCE, STEPS, FEW, LANES = 2.5, 25, 8, 16
PART = 32  # prompts that a way draws before the next way does
ALL = "all noise"
INTERVALS: dict[str, dict[str, float]] = {
    ALL: {},
    "sigma <= 5.42": {"guidance_sigma_high": 5.42},
    "sigma > 0.28": {"guidance_sigma_low": 0.28},
    "0.28 < sigma <= 5.42": {"guidance_sigma_low": 0.28, "guidance_sigma_high": 5.42},
    "0.5 < sigma <= 3": {"guidance_sigma_low": 0.5, "guidance_sigma_high": 3},
    "no guidance": {"guidance_scale": 1.0},
}


class Way:
    """Pictures that are drawn with some values, and what they took."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.rows = self.cpu_s = 0.0

    def draw(self, engine: Engine, captioned: list[Caption]) -> None:
        """Draw a part of the prompts; the engine does nothing else meanwhile."""
        rows, cpu = engine.usage.filled, time.process_time()
        futures = []
        for number, (_, prompt) in enumerate(captioned, len(self.pictures)):
            values = {"sampler": "dpmpp_2m", "guidance_scale": GUIDANCE, **self.values}
            request = Request(prompt=prompt, seed=number, height=SIDE, width=SIDE, **values)
            futures.append(engine.submit(request))
        for (_, prompt), future in zip(captioned, futures, strict=True):
            self.pictures.append((prompt, future.result().image))
        self.cpu_s += time.process_time() - cpu
        self.rows += engine.usage.filled - rows

    def findings(self, exact: "Way") -> dict[str, str | float]:
        """Return the figures; PSNR is that of the mean square error of all pictures together."""
        ours, theirs = (
            np.stack([picture for _, picture in way.pictures]).astype(float)
            for way in (self, exact)
        )
        error = float(((ours - theirs) ** 2).mean())
        return {
            f"{WHOLE}, %": rates(self.pictures)[WHOLE],
            "PSNR, dB": round(10 * np.log10(255**2 / error), 1) if error else "equal",
            "denoiser rows": round(self.rows / exact.rows, 3),
            "images per CPU s": round(len(self.pictures) / self.cpu_s, 2),
        }


@click.command(help=__doc__)
@click.option("--images", default=64, show_default=True, help="With each way.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
def main(images: int, output: Path | None) -> None:
    """Measure."""
    findings = Findings(output)
    machine = f"{platform.machine()}, {cores()} cores, one thread"
    findings.add("machine", {"device": machine, "date": time.strftime("%Y-%m-%d"), **versions()})
    engine = Engine(StableDiffusion1(load_model("float32")), lanes=LANES, threads=1)
    captioned = prompts(images)
    tables = {
        f"guidance {GUIDANCE} in an interval, {steps} steps": {
            name: Way(num_inference_steps=steps, **values) for name, values in INTERVALS.items()
        }
        for steps in (STEPS, FEW)
    }
    ways = [way for table in tables.values() for way in table.values()]
    lcm = Way(num_inference_steps=FEW, sampler="lcm")
    for start in range(0, images, PART):
        for way in (*ways, lcm):
            way.draw(engine, captioned[start : start + PART])
    engine.close()
    for title, table in tables.items():
        found = {name: way.findings(table[ALL]) for name, way in table.items()}
        findings.add(f"{title}, {images} images each", found)
    few = tables[f"guidance {GUIDANCE} in an interval, {FEW} steps"][ALL]
    findings.add(f"lcm, guidance {GUIDANCE}, {FEW} steps", {"lcm": lcm.findings(few)})


if __name__ == "__main__":
    main()
