"""A whole command for 1,000 tiny images: sdbatch, diffusers, and diffusers under Ray Data.

    python benchmarks/small_job.py [--model tiny] [--turns 3]

Each side is a fresh process that draws the same 1,000 prompts (64x64, 20 steps, with guidance) with
a random model of 0.8 M parameters (tiny) or with the embedded one of 5 M on all cores, and writes
them as JPEG into Parquet, with their prompts and seeds: diffusers' pipeline in batches of 16 with a
thread a core; the same in map_batches of Ray Data, with an actor of one thread a core: all of them
from the start, or a pool that grows to them. Every side has its own defaults, so sdbatch draws in
bfloat16 where the CPU has it. Seconds from the command to its end, medians. Start-up counts: such a
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
SIDE, STEPS, GUIDANCE = 64, 20, 7.5
JOB = f"""
prompts: {{path: p.txt}}
model: {{path: model}}
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
    "the same, a pool that grows": [__file__, "--side", "ray-growing"],
}


class Pipeline:
    """diffusers' pipeline with the model in the folder."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        torch.set_num_threads(threads)
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

    pipe = Pipeline("model", cores())
    prompts = Path("p.txt").read_text().splitlines()
    drawn = []
    for at in range(0, IMAGES, BATCH):
        seeds = range(at, min(at + BATCH, IMAGES))
        drawn.append(pa.table(pipe({"prompt": prompts[at : at + BATCH], "seed": list(seeds)})))
    pq.write_table(pa.concat_tables(drawn), "out.parquet")


def draw_under_ray(least: int) -> None:
    """Draw the table as Ray Data's documentation shows, with a pool of `least` actors or more."""
    import ray

    ray.init(include_dashboard=False)
    prompts = Path("p.txt").read_text().splitlines()
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    dataset = ray.data.from_items(rows)
    drawn = dataset.map_batches(
        Pipeline,
        fn_constructor_args=(str(Path("model").resolve()), 1),
        batch_size=BATCH,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=cores()),
    )
    drawn.write_parquet("out")


def save_model(name: str, folder: Path) -> None:
    """Save the model as a folder of diffusers' layout."""
    import models
    import oracle

    from sdbatch.models.build import Build
    from sdbatch.models.sd1.loading import assemble

    oracle.pipeline(assemble(models.parts(name), Build("cpu", "float32"))).save_pretrained(folder)


def run_once(side: str, model: Path) -> float:
    """Run one side in a fresh folder; return the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = [f"a red circle on a blue background, number {i}" for i in range(IMAGES)]
        Path(folder, "p.txt").write_text("\n".join(prompts))
        Path(folder, "job.yaml").write_text(JOB)
        Path(folder, "model").symlink_to(model)
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


def compare(model: Path, turns: int) -> dict[str, list[float]]:
    """Run all sides in turns; print and return their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(turns):
        for name in list(SIDES) if turn % 2 == 0 else reversed(SIDES):
            seconds[name].append(round(run_once(name, model), 2))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in medians.items():
        ratio = each / medians["sdbatch"]
        print(f"{model.name:9} {name:26} {each:6.2f} s   {ratio:.2f} times sdbatch's", flush=True)
    return seconds


@click.command(help=__doc__)
@click.option("--model", "names", multiple=True, default=("tiny", "embedded"), show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option(
    "--side", type=click.Choice(["diffusers", "ray", "ray-growing"]), help="Run one side, here."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(names: tuple[str, ...], turns: int, side: str | None, output: Path | None) -> None:
    """Measure all sides in turns, or run one of them."""
    if side == "diffusers":
        draw_with_diffusers()
    elif side is not None:
        draw_under_ray(1 if side == "ray-growing" else cores())
    else:
        seconds = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                save_model(name, Path(folder, name))
                seconds[name] = compare(Path(folder, name), turns)
        report(output, images=IMAGES, turns=turns, seconds=seconds)


if __name__ == "__main__":
    main()
