"""How often each sampler makes the host wait in a tick, and how many small kernels it launches.

    python benchmarks/waits.py [--before REVISION] [--steps 6] [--output FILE]

Cohorts of one guided image each step together on a pretend device (benchmarks/pretend_device.py),
with the tiny model's text encoder and without its UNet: counted is all that a tick does outside the
denoiser call. With --before the code of another commit or branch is counted, too. Also printed is
the CPU time that a step of dpmpp_sde takes of the engine's thread, for 16 images of 512x512.
Prints a table and, on the last line, JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import pretend_device
import torch
from before_after import ROOT, checked_out
from findings import report

sys.path.append(str(ROOT))  # the code of another state comes first

from sdbatch.engine import cuda
from sdbatch.engine.cohort import Ticket
from sdbatch.engine.lanes import Lanes
from sdbatch.engine.request import Request
from sdbatch.job import Model, Safety
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.samplers import SAMPLERS
from tests import tiny

COHORTS = (1, 4, 16)
IMAGES, SIDE = 16, 512  # of the noise that is timed


class WithoutUnet(StableDiffusion1):
    """A family whose denoiser answers with its input."""

    def denoise(self, latents: torch.Tensor, *unused: Any) -> torch.Tensor:
        """Return the input."""
        return latents


def request(sampler: str, steps: int, seed: int, side: int) -> Request:
    """Return a guided request."""
    return Request(
        prompt=f"a dog, number {seed}",
        seed=seed,
        sampler=sampler,
        num_inference_steps=steps,
        guidance_scale=5.0,
        height=side,
        width=side,
    )


def start(family: StableDiffusion1, requests: list[Request]) -> Lanes:
    """Start a cohort for each request."""
    lanes = Lanes(family, 2 * len(requests))
    tickets = [Ticket(each, family.read(each)) for each in requests]
    for ticket in tickets:
        if hasattr(family, "sigmas"):  # revisions without it need nothing here
            ticket.sigmas = family.sigmas(ticket.request)
        lanes.start([ticket])
    return lanes


def ticks(lanes: Lanes) -> int:
    """Tick to the end; return how often."""
    count = 0
    while not lanes.cohorts[0].done:
        lanes.tick(lambda _, call: call())
        count += 1
    return count


def count(family: StableDiffusion1, sampler: str, cohorts: int, steps: int) -> dict[str, Any]:
    """Return the host's waits and the kernels a tick, and the lines that wait."""
    requests = [request(sampler, steps, seed, 64) for seed in range(cohorts)]
    lanes = start(family, requests)
    log = pretend_device.log
    log.clear()
    made = ticks(lanes)
    return {
        "waits": round(log.waits.total() / made, 2),
        "kernels": round(log.kernels.total() / made, 1),
        "mismatches": log.mismatches.total(),
        "copies": round(log.copies.total() / made, 2),
        "lines": sorted({line.partition(" @ ")[2] for line in log.waits}),
    }


def sde_ms(family: StableDiffusion1, steps: int) -> float:
    """Return the milliseconds of CPU time that a step of dpmpp_sde takes of the engine's thread."""
    requests = [request("dpmpp_sde", steps, seed, SIDE) for seed in range(IMAGES)]
    generators = [torch.Generator().manual_seed(each.seed) for each in requests]
    noise = torch.stack([family.noise(*each) for each in zip(requests, generators, strict=True)])
    scheduler = family.scheduler(requests, noise, generators)
    latents = scheduler.start(noise)
    count = len(scheduler.timesteps)
    began = time.thread_time()
    for step in range(count):
        latents = scheduler.step(latents, step, latents)
    return round(1000 * (time.thread_time() - began) / count, 1)


def take_the_gpus_way() -> None:
    """Let code that knows no device but the CPU and CUDA copy to the pretend device, too."""
    before = cuda.moved

    def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    for module in list(sys.modules.values()):
        if getattr(module, "moved", None) is before:
            module.moved = moved  # type: ignore[attr-defined]


@torch.inference_mode()
def measure(steps: int) -> dict[str, Any]:
    """Count all samplers with the code that is imported."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pretend_device.active():
        tiny.write_folder(Path(folder, "model"))
        files = find_model(Model(path=f"{folder}/model"), Safety(checker="none"))
        if cuda.moved(torch.zeros(1), torch.device(pretend_device.NAME)).device.type == "cpu":
            take_the_gpus_way()
        here, there = (
            WithoutUnet(loading.load(files, Build(device, "float32")))
            for device in ("cpu", pretend_device.NAME)
        )
        counts = {
            sampler: {str(cohorts): count(there, sampler, cohorts, steps) for cohorts in COHORTS}
            for sampler in SAMPLERS
        }
        sde = {"cpu": sde_ms(here, steps), "other device": sde_ms(there, steps)}
    return {"samplers": counts, "sde_ms_a_step": sde}


def measure_before(revision: str, steps: int) -> dict[str, Any]:
    """Count all samplers with the code of another commit or branch."""
    with checked_out(revision) as state:
        command = [sys.executable, __file__, "--steps", str(steps)]
        environment = {**os.environ, "PYTHONPATH": str(state)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{revision}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["after"]
    return found


@click.command(help=__doc__)
@click.option("--before", help="A commit or branch to count, too.")
@click.option("--steps", default=6, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(before: str | None, steps: int, output: Path | None) -> None:
    """Count waits and kernels."""
    states = {} if before is None else {"before": measure_before(before, steps)}
    states["after"] = measure(steps)
    heads = "".join(f"{cohorts:>12} cohorts" for cohorts in COHORTS)
    for name, state in states.items():
        print(f"{name}: waits / small kernels a tick\n{'':14}{heads}")
        for sampler, by_cohorts in state["samplers"].items():
            cells = (f"{each['waits']:8g} /{each['kernels']:8g}" for each in by_cohorts.values())
            print(f"{sampler:14}{'  '.join(cells)}")
        spent = ", ".join(f"{each} ms ({where})" for where, each in state["sde_ms_a_step"].items())
        print(f"dpmpp_sde, {IMAGES} images of {SIDE}x{SIDE}, engine's thread a step: {spent}")
    report(output, steps=steps, revision=before, **states)


if __name__ == "__main__":
    main()
