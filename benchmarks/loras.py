"""LoRAs by row in one engine, compared with jobs one after the other and with merged weights.

    python benchmarks/loras.py [--model embedded] [--rank 16] [--images 64] [--lanes 16]

Draws the same rows, of which each uses one of N LoRAs (attention and feed-forward layers of the
UNet, and the text encoder), in four ways. `by row`: one engine, rows of all LoRAs mixed, as sdbatch
does it. `unused`: the same engine, rows that use none. `jobs`: an engine for each LoRA, fused, one
after the other; loading is not counted. `merged`: one engine, rows sorted by LoRA, whose weights
are merged in before each group and restored after it. Prints images per second of CPU time, of
one thread, as other programs may share the machine; JSON on the last line.
"""

import copy
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import models
import torch
from findings import report
from safetensors.torch import save_file

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.layers import Layer, layers_of
from sdbatch.models.sd1.loading import assemble
from sdbatch.models.sd1.networks import LayerNetwork, read_network

TARGETS = re.compile(r"(to_[qkv]|to_out\.0|proj|ff\.net\.2|proj_in|proj_out|[qkv]_proj|fc[12])$")
COUNTS = (1, 4, 8)  # LoRAs
Network = Mapping[Layer, LayerNetwork]


def write_lora(parts: dict[str, Any], path: Path, rank: int, seed: int) -> None:
    """Write a random LoRA of the layers that kohya's scripts train by default."""
    generator, file = torch.Generator().manual_seed(seed), {}
    for part in ("unet", "text_encoder"):
        for name, layer in parts[part].named_modules():
            if TARGETS.search(name) and hasattr(layer, "weight"):
                outputs, inputs, *kernel = layer.weight.shape
                down = torch.randn(rank, inputs, *kernel, generator=generator) * 0.02
                up = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator) * 0.02
                file |= {f"{part}.{name}.lora_down.weight": down}
                file |= {f"{part}.{name}.lora_up.weight": up}
    save_file(file, path)


def networks_of(parts: dict[str, Any], paths: list[Path]) -> dict[str, Network]:
    """Return the networks of the files, by the names of the files, for these parts."""
    layers = layers_of(parts["unet"], parts["text_encoder"])
    return {path.stem: read_network(str(path), layers) for path in paths}


def change(network: Network, strength: float) -> None:
    """Add a network to the weights."""
    for layer, part in network.items():
        delta, _ = part.delta(layer)
        layer.weight.data = (layer.weight.data.float() + strength * delta).to(layer.weight.dtype)


class Bench:
    """The same rows, drawn in several ways."""

    def __init__(self, name: str, lanes: int, images: int, repeats: int, build: Build) -> None:
        self._name, self._lanes, self._build = name, lanes, build
        self._images, self._repeats = images, repeats
        self._parts = models.parts(name, "cpu", getattr(torch, build.dtype))

    def parts(self) -> dict[str, Any]:
        """Return parts of the model that may be changed."""
        return copy.deepcopy(self._parts)

    def engine(self, parts: dict[str, Any], networks: Mapping[str, Network]) -> Engine:
        """Return an engine whose rows can choose `networks`."""
        weights = dict.fromkeys(networks, 1.0)
        model = assemble(parts, self._build, row_loras=networks, lora_weights=weights)
        engine = Engine(StableDiffusion1(model), lanes=self._lanes, threads=1)
        draw(engine, self.rows([*networks])[:4])  # a warm-up
        return engine

    def rows(self, names: list[str]) -> list[Request]:
        """Return the rows; row i uses the LoRA i of `names`, in turn, or none."""
        side = models.pixels(self._name)
        return [
            Request(
                prompt=f"a red circle, number {i}",
                seed=i,
                sampler="euler",
                num_inference_steps=8,
                guidance_scale=5.0,
                height=side,
                width=side,
                loras=names[i % len(names)] if names else "",
            )
            for i in range(self._images)
        ]

    def speed(self, draw_all: Callable[[], None]) -> float:
        """Return the images a second of CPU time: the median of several times."""
        seconds = []
        for _ in range(self._repeats):
            began = time.process_time()
            draw_all()
            seconds.append(time.process_time() - began)
        return round(self._images / statistics.median(seconds), 3)

    def by_row(self, paths: list[Path], *, used: bool) -> float:
        """Time one engine that declares the LoRAs of all `paths`."""
        parts = self.parts()
        engine = self.engine(parts, networks_of(parts, paths))
        rows = self.rows([path.stem for path in paths] if used else [])
        try:
            return self.speed(lambda: draw(engine, rows))
        finally:
            engine.close()

    def jobs(self, paths: list[Path]) -> float:
        """Time an engine for each LoRA, one after the other."""
        engines = []
        for path in paths:
            parts = self.parts()
            change(networks_of(parts, [path])[path.stem], 1.0)
            engines.append(self.engine(parts, {}))
        rows = self.rows([])

        def draw_all() -> None:
            for i, engine in enumerate(engines):
                draw(engine, rows[i :: len(paths)])

        try:
            return self.speed(draw_all)
        finally:
            for engine in engines:
                engine.close()

    def merged(self, paths: list[Path]) -> tuple[float, float]:
        """Time one engine whose weights change from group to group; seconds of a change, too."""
        parts = self.parts()
        networks = networks_of(parts, paths)
        engine = self.engine(parts, {})
        rows, spent = self.rows([]), []

        def draw_all() -> None:
            for i, network in enumerate(networks.values()):
                began = time.process_time()
                saved = {layer: layer.weight.data for layer in network}
                change(network, 1.0)
                spent.append(time.process_time() - began)
                draw(engine, rows[i :: len(paths)])
                for layer, weight in saved.items():
                    layer.weight.data = weight

        try:
            return self.speed(draw_all), round(statistics.median(spent), 4)
        finally:
            engine.close()


def draw(engine: Engine, rows: list[Request]) -> None:
    """Draw all rows."""
    for future in [engine.submit(row) for row in rows]:
        future.result()


@click.command(help=__doc__)
@click.option("--model", "name", default=models.EMBEDDED, type=click.Choice(models.NAMES))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--lanes", default=16, show_default=True)
@click.option("--images", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(name: str, dtype: str, output: Path | None, **sizes: int) -> None:
    """Time LoRAs by row."""
    torch.set_num_threads(1)
    bench = Bench(name, sizes["lanes"], sizes["images"], sizes["repeats"], Build("cpu", dtype))
    found: dict[str, Any] = {"none": {"by row": bench.by_row([], used=False)}}
    print(f"no LoRA: {found['none']['by row']} images/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"lora{i}.safetensors" for i in range(max(COUNTS))]
        for seed, path in enumerate(paths):
            write_lora(bench.parts(), path, sizes["rank"], seed)
        for count in COUNTS:
            some = paths[:count]
            merged, change_s = bench.merged(some)
            row = {
                "by row": bench.by_row(some, used=True),
                "unused": bench.by_row(some, used=False),
                "jobs": bench.jobs(some),
                "merged": merged,
                "change_s": change_s,
            }
            found[str(count)] = row
            print(f"{count} LoRAs: {row}", flush=True)
    report(output, model=name, dtype=dtype, threads=1, **sizes, found=found)


if __name__ == "__main__":
    main()
