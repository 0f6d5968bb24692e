"""How far the engine's latents and images are from StableDiffusionPipeline's, by sampler.

    python benchmarks/parity.py [--steps 10] [--dtype float32]

Every sampler, with guidance and without, on the tiny random model: the engine in 8 lanes against
diffusers, which draws the request alone. The difference is rounding: the UNet's batch has another
shape (8 rows against 1 or 2), which moves each of its answers by about 1e-6 of their size, and a
sampler passes that on from step to step. Prints a table and, on the last line, JSON.
"""

from pathlib import Path
from typing import Any

import click
import models
import numpy as np
import oracle
import torch
from findings import report

from sdbatch.engine.engine import Engine
from sdbatch.engine.family import Pictures
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model, assemble
from sdbatch.samplers import NAMES


class KeepsLatents(StableDiffusion1):
    """Keeps the last latents that it decodes: (C, h, w)."""

    last = torch.empty(0)

    def decode(self, latents: torch.Tensor, dtype: torch.dtype) -> Pictures:
        """Keep the first latents of the group, and decode it."""
        self.last = latents[0].clone()
        return super().decode(latents, dtype)


def difference(
    model: Model, engine: Engine, family: KeepsLatents, request: Request
) -> dict[str, Any]:
    """Draw the request with both; return the greatest differences."""
    pipe = oracle.pipeline(model)
    image = engine.submit(request).result().image.astype(int)
    reference = oracle.draw(pipe, request, model.scheduler_config)
    latents = oracle.draw(pipe, request, model.scheduler_config, output_type="latent").float()
    return {
        "latents": float((family.last - latents).abs().max()),
        "of": float(latents.abs().max()),
        "counts": int(np.abs(image - oracle.counts(reference)).max()),
    }


@click.command(help=__doc__)
@click.option("--steps", default=10, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(steps: int, dtype: str, output: Path | None) -> None:
    """Compare every sampler with diffusers."""
    torch.set_num_threads(1)
    model = assemble(
        models.parts("tiny", dtype=getattr(torch, dtype)), Build("cpu", dtype, channels_last=True)
    )
    family = KeepsLatents(model)
    engine = Engine(family, lanes=8, threads=1)
    found: dict[str, dict[str, Any]] = {}
    print(f"{'':24} {'guided':>28} {'unguided':>28}")
    print(f"{'sampler':24}" + f" {'latents':>10} {'of':>8} {'counts':>8}" * 2)
    for sampler in NAMES:
        row = {}
        for name, scale in (("guided", 7.5), ("unguided", 1.0)):
            request = Request(
                prompt="a photograph of a dog",
                seed=7,
                sampler=sampler,
                num_inference_steps=10 if sampler.endswith("_ays") else steps,
                guidance_scale=scale,
                height=64,
                width=64,
            )
            row[name] = difference(model, engine, family, request)
        found[sampler] = row
        cells = [f" {d['latents']:10.1e} {d['of']:8.1f} {d['counts']:8}" for d in row.values()]
        print(f"{sampler:24}{''.join(cells)}")
    engine.close()
    every = [d for row in found.values() for d in row.values()]
    worst = max(d["latents"] / d["of"] for d in every)
    print(
        f"greatest difference: {worst:.1e} of the latents, {max(d['counts'] for d in every)} counts"
    )
    report(output, dtype=dtype, steps=steps, samplers=found)


if __name__ == "__main__":
    main()
