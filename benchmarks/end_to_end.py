"""`sdbatch run`, with files, Ray and the output, against the bare engine on the same device.

    python benchmarks/end_to_end.py [--steps 25] [--images 800]     # on a GPU
    python benchmarks/end_to_end.py --small                         # the tests' model on a CPU

A random model in Stable Diffusion 1.5's shape is written into a folder. The bare engine draws as
many images before and after the run, with the settings that the run has resolved. Compared are the
images/s of the run since its engine was ready with the median of the bare engine's.
Prints both, the closing report's own figure, and on the last line JSON.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import click
import models
import torch
from findings import report
from oracle import pipeline

from sdbatch import resolve
from sdbatch.batch.pipeline import prepare, run_job
from sdbatch.engine.request import Request
from sdbatch.job import Job, parse
from sdbatch.models.build import Build
from sdbatch.models.sd1.loading import assemble

LEAST = 0.97  # of the bare engine's images/s, on a GPU


def job_of(folder: Path, setting: bench.Setting, steps: int, images: int) -> Job:
    """Write a model and a prompt table into `folder`; return the job that draws them there."""
    parts = models.parts(setting.name, setting.device, getattr(torch, setting.dtype))
    pipeline(assemble(parts, Build(setting.device, setting.dtype))).save_pretrained(
        folder / "model"
    )
    table = folder / "prompts.txt"
    table.write_text("".join(f"a photograph of a dog, number {i}\n" for i in range(images)))
    values: dict[str, Any] = {
        "prompts": {"path": str(table)},
        "model": str(folder / "model"),
        "sampling": {
            "sampler": "dpmpp_2m",
            "num_inference_steps": steps,
            "guidance_scale": bench.GUIDANCE,
            "height": setting.pixels,
            "width": setting.pixels,
        },
        "engine": {"device": setting.device, "dtype": setting.dtype},
        "cluster": {"actors": 1},
        "output": {"path": str(folder / "out")},
    }
    return parse(values)


def bare_rate(job: Job, images: int) -> float:
    """Return the images/s of an engine alone, as the job resolves it, warmed up."""
    ready = prepare(job)
    planned = ready.plan.job
    resolved = resolve.resolve(
        planned, ready.model, torch.cuda.device_count(), planned.model.sha256
    )
    engine: Any = resolved.make_engine()()
    values = job.sampling.model_dump()
    requests = [
        Request(**{**values, "prompt": f"a dog, number {i}", "seed": i}) for i in range(images)
    ]
    engine.submit(requests[0].updated(num_inference_steps=1)).result()
    began = time.perf_counter()
    for future in [engine.submit(request) for request in requests]:
        future.result()
    seconds = time.perf_counter() - began
    engine.close()
    return images / seconds


@click.command(help=__doc__)
@click.option("--steps", default=25, show_default=True)
@click.option("--images", default=800, show_default=True)
@click.option("--small", is_flag=True, help="The tests' model on a CPU, and fewer images.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(steps: int, images: int, small: bool, output: Path | None) -> None:
    """Measure."""
    if not small and not torch.cuda.is_available():
        raise click.ClickException("this machine has no GPU: run with --small")
    setting = bench.SMALL if small else bench.FULL
    images = min(images, 96) if small else images
    with tempfile.TemporaryDirectory() as name:
        job = job_of(Path(name), setting, steps, images)
        bare = [bare_rate(job, images)]
        done = run_job(job)
        bare.append(bare_rate(job, images))
    assert done.images == images, done
    ratio = done.images_per_s / statistics.median(bare)
    print(f"bare engine  {' and '.join(f'{rate:.2f}' for rate in bare)} images/s")
    print(f"sdbatch run  {done.images_per_s:.2f} images/s, {ratio:.3f} of it (aim: {LEAST})")
    if done.engines is not None:
        print(*done.engines.lines(), sep="\n")
    report(
        output,
        device=torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        steps=steps,
        images=images,
        bare_images_per_s=[round(rate, 3) for rate in bare],
        run_images_per_s=round(done.images_per_s, 3),
        ratio=round(ratio, 4),
    )


if __name__ == "__main__":
    main()
