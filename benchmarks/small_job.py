"""A whole command for 1,000 tiny images: sdbatch, diffusers, and diffusers under Ray Data.

    python benchmarks/small_job.py [--turns 3]

Each side is a fresh process that draws the same 1,000 prompts (64x64, 16 steps, guidance 2.5) with
the embedded model on all cores, and writes them as JPEG into Parquet, with their prompts and seeds:
diffusers' pipeline in batches of 16 with a thread a core; the same in map_batches of Ray Data, with
an actor of one thread a core. Seconds from the command to its end, medians. Start-up counts: such a
job is little else. Prints a table and JSON.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from findings import report

from sdbatch.cores import cores

IMAGES, BATCH = 1000, 16
SIDE, STEPS, GUIDANCE = 64, 16, 2.5
JOB = f"""
prompts: {{path: p.txt}}
model: builtin:shapes
sampling:
  sampler: dpmpp_2m
  num_inference_steps: {STEPS}
  guidance_scale: {GUIDANCE}
  height: {SIDE}
  width: {SIDE}
output: {{path: out}}
"""
SIDES = {
    "sdbatch": ["-c", "from sdbatch.cli import main; main()", "run", "job.yaml"],
    "diffusers": [__file__, "--side", "diffusers"],
    "diffusers under Ray Data": [__file__, "--side", "ray"],
}


class Pipeline:
    """diffusers' pipeline with the embedded model."""

    def __init__(self, threads: int) -> None:
        import torch
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        import sdbatch

        torch.set_num_threads(threads)
        folder = Path(sdbatch.__file__).parent / "builtin" / "shapes"
        self._pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self._pipe.scheduler = DPMSolverMultistepScheduler.from_config(self._pipe.scheduler.config)
        self._pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Draw a batch of `prompt` and `seed`; add `image`, JPEG files."""
        import torch

        images = self._pipe(
            list(batch["prompt"]),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]],
        ).images
        return {**batch, "image": [jpeg(image) for image in images]}


def jpeg(image: Any) -> bytes:
    """Encode an image as sdbatch does by default."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def draw_with_diffusers() -> None:
    """Draw the table in one process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pipe = Pipeline(cores())
    prompts = Path("p.txt").read_text().splitlines()
    drawn = []
    for at in range(0, IMAGES, BATCH):
        seeds = range(at, min(at + BATCH, IMAGES))
        drawn.append(pa.table(pipe({"prompt": prompts[at : at + BATCH], "seed": list(seeds)})))
    pq.write_table(pa.concat_tables(drawn), "out.parquet")


def draw_under_ray() -> None:
    """Draw the table as Ray Data's documentation shows for batch inference."""
    import ray

    ray.init(include_dashboard=False)
    prompts = Path("p.txt").read_text().splitlines()
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    dataset = ray.data.from_items(rows, override_num_blocks=IMAGES // BATCH)
    drawn = dataset.map_batches(
        Pipeline,
        fn_constructor_args=(1,),
        batch_size=BATCH,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=cores()),
    )
    drawn.write_parquet("out")


def run_once(side: str) -> float:
    """Run one side in a fresh folder; return the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = [f"a red circle on a blue background, number {i}" for i in range(IMAGES)]
        Path(folder, "p.txt").write_text("\n".join(prompts))
        Path(folder, "job.yaml").write_text(JOB)
        root = str(Path(__file__).parent.parent.resolve())
        environment = {**os.environ, "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}
        began = time.time()
        subprocess.run(
            [sys.executable, *SIDES[side]],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
        )
        seconds = time.time() - began
        assert list(Path(folder).glob("out*")), f"{side} wrote nothing"
        return seconds


def compare(turns: int, output: Path | None) -> None:
    """Run all sides in turns and report their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(turns):
        for name in list(SIDES) if turn % 2 == 0 else reversed(SIDES):
            seconds[name].append(round(run_once(name), 2))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in medians.items():
        print(f"{name:26} {each:6.2f} s   {each / medians['sdbatch']:.2f} times sdbatch's")
    report(output, images=IMAGES, turns=turns, seconds=medians, every=seconds)


@click.command()
@click.option("--turns", default=3, show_default=True)
@click.option("--side", type=click.Choice(["diffusers", "ray"]), help="Run one side, here.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(turns: int, side: str | None, output: Path | None) -> None:
    """Measure the three sides in turns, or run one of them."""
    if side == "diffusers":
        draw_with_diffusers()
    elif side == "ray":
        draw_under_ray()
    else:
        compare(turns, output)


if __name__ == "__main__":
    main()
