"""What each rewrite of the model gains, in FLOP, in CPU time, and in rounding.

    python benchmarks/rewrites.py [--pairs 7] [--output benchmarks/results/rewrites.json]

Sides: `blocks` is sdbatch's model (sd1/blocks.py) against diffusers' own modules, and each rewrite
of registry.REWRITES that runs on a CPU against sdbatch's model without it. Time is CPU time of one
thread, so that other programs of the machine count little: the median ratio of pairs of calls in
one process, in turns; below 1 is faster. FLOP is counted by torch; that of Stable Diffusion 1.5 on
torch's meta device. Error is the greatest difference from diffusers in float64 on the same inputs,
divided by the greatest value. `shared_prefix` is measured in 32 lanes of the embedded model's UNet
of which all, 20 or none are of guided images, each next to `noise`, the plain UNet against itself.
`group_norm_silu` runs on CUDA alone, so its gain is predicted: the kernels and bytes that it saves
an image in float16 are counted. JSON on the last line.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import models
import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpDecoderBlock2D
from findings import report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdbatch.models.build import Build
from sdbatch.models.sd1 import blocks, rewrites
from sdbatch.models.sd1.loading import assemble

PLAIN, BLOCKS = "diffusers", "blocks"
ON_A_CPU = ("phase_upsample", "text_kv")
BUILDS = {"float32 NHWC": ("float32", True), "bfloat16 NCHW": ("bfloat16", False)}
LANES, IMAGES = 16, 4
PREFIX_LANES = {  # of 32 lanes each, the first lane of its image
    "all guided": [*range(16)] * 2,
    "some guided": [*range(22), *range(10)],
    "none guided": [*range(32)],
}
# Measured once with scripts that are not kept, or by argument; so that nobody tries them again.
LEFT_OUT = {
    "phase_upsample as four convolutions or one of four times the channels": "no faster on a CPU "
    "than the transposed convolution, and more code",
    "shared_prefix in one call of half the lanes, or two where more images are drawn": "where none "
    "is guided it takes 1.01 to 1.06 of the time in four runs: what both calls return is copied",
}
# What a GroupNorm of torch costs on CUDA, by its kernels: (launches, passes over the picture).
# Statistics 1 and 1, factors 1 and 0, normalizing 1 and 2, SiLU 1 and 2; with channels_last also a
# copy before and one in the convolution after it, 1 and 2 each. Joined: 3 and 3.
NORM_COSTS = {
    ("channels_last", True): (6, 9),
    ("channels_last", False): (5, 7),
    ("contiguous", True): (4, 5),
    ("contiguous", False): (3, 3),
}
JOINED_COST = (3, 3)


@dataclass
class Side:
    """A UNet and a decoder as functions of latents, times and text."""

    unet: Callable[..., torch.Tensor]
    vae: Callable[[torch.Tensor], torch.Tensor]
    text: torch.Tensor  # as this UNet takes it


class Inputs:
    """Latents and text of a size, in float64; the same on every call."""

    def __init__(self, width: int, side: int, lanes: int = LANES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(lanes, 4, side, side, generator=generator).double()
        self.text = torch.randn(lanes, 77, width, generator=generator).double()
        self.times = torch.linspace(1, 999, lanes)


def sides_of(parts: dict[str, Any], build: Build, inputs: Inputs) -> dict[str, Side]:
    """Return diffusers' own modules, sdbatch's, and sdbatch's with each rewrite."""
    layout = torch.channels_last if build.channels_last else torch.contiguous_format
    dtype = getattr(torch, build.dtype)
    text = inputs.text.to(dtype)
    found = {}
    for name in (PLAIN, BLOCKS, *ON_A_CPU):
        own = copy.deepcopy(parts)
        if name == PLAIN:
            unet, vae = (own[part].eval().to(memory_format=layout) for part in ("unet", "vae"))
            found[name] = side_of(unet, vae, text)
            continue
        names = (name,) if name in ON_A_CPU else ()
        model = assemble(own, Build(build.device, build.dtype, build.channels_last, rewrites=names))
        if model.text_projection is not None:
            rows = model.text_projection.project(list(text), [()] * LANES)
            found[name] = side_of(model.unet, model.vae, torch.stack(rows))
        else:
            found[name] = side_of(model.unet, model.vae, text)
    return found


def side_of(unet: Any, vae: Any, text: torch.Tensor) -> Side:
    """Return the modules as functions."""

    def denoise(latents: torch.Tensor, times: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = unet(latents, times, encoder_hidden_states=text, return_dict=False)[
            0
        ]
        return answer

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pictures: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return pictures

    return Side(denoise, decode, text)


def gflop(call: Callable[[], Any]) -> float:
    """Return the GFLOP of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return round(counter.get_total_flops() / 1e9, 3)


def ratio(one: Callable[[], Any], two: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Return the median CPU time of `two` over that of `one`, and the least and greatest ratio."""
    ratios, base = [], []
    for i in range(pairs + 1):
        seconds: dict[int, float] = {}
        for side in ((0, 1), (1, 0))[i % 2]:
            began = time.thread_time()
            (one, two)[side]()
            seconds[side] = time.thread_time() - began
        if i:  # the first is a warm-up
            ratios.append(seconds[1] / seconds[0])
            base.append(seconds[0])
    return {
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
        "ms_before": round(1000 * statistics.median(base), 2),
    }


@torch.inference_mode()
def whole_model(name: str, dtype: str, channels_last: bool, pairs: int) -> dict[str, Any]:
    """Compare the sides on a whole model."""
    parts = models.parts(name, "cpu", getattr(torch, dtype))
    inputs = Inputs(parts["unet"].config.cross_attention_dim, models.pixels(name) // 8)
    build = Build("cpu", dtype, channels_last)
    sides = sides_of(parts, build, inputs)
    wide = sides_of(
        {k: v.double() if isinstance(v, nn.Module) else v for k, v in parts.items()},
        Build("cpu", "float64"),
        inputs,
    )[PLAIN]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    latents = inputs.latents.to(getattr(torch, dtype), memory_format=layout)
    few = latents[:IMAGES]
    exact = {
        "unet": wide.unet(inputs.latents, inputs.times, wide.text),
        "vae": wide.vae(inputs.latents[:IMAGES]),
    }
    found: dict[str, Any] = {}
    for part in ("unet", "vae"):
        calls: dict[str, Callable[[], torch.Tensor]] = {}
        for key, side in sides.items():
            calls[key] = (
                partial(side.unet, latents, inputs.times, side.text)
                if part == "unet"
                else partial(side.vae, few)
            )
        greatest = exact[part].abs().max()
        for key in (BLOCKS, *ON_A_CPU):
            before = PLAIN if key == BLOCKS else BLOCKS
            outcome = [calls[each]() for each in (before, key)]
            errors = [((each - exact[part]).abs().max() / greatest).item() for each in outcome]
            found[f"{key}, {part}"] = {
                "gflop_before": gflop(calls[before]),
                "gflop": gflop(calls[key]),
                **ratio(calls[before], calls[key], pairs),
                "error_before": float(f"{errors[0]:.3g}"),
                "error": float(f"{errors[1]:.3g}"),
                "same_bits": torch.equal(*outcome),
            }
    return found


@torch.inference_mode()
def shared_prefix(name: str, dtype: str, channels_last: bool, pairs: int) -> dict[str, Any]:
    """Compare a model's UNet with and without the prefix that the lanes of an image share."""
    parts = models.parts(name, "cpu", getattr(torch, dtype))
    model = assemble(parts, Build("cpu", dtype, channels_last, rewrites=("shared_prefix",)))
    inputs = Inputs(model.unet.config.cross_attention_dim, models.pixels(name) // 8, 32)
    found: dict[str, Any] = {}
    for case, lanes in PREFIX_LANES.items():
        latents = inputs.latents[lanes].to(model.dtype, memory_format=model.layout)
        given = latents, inputs.times[lanes], inputs.text.to(model.dtype)
        plain = side_of(model.unet, model.vae, given[2]).unet
        one, two = partial(plain, *given), partial(model.call_unet, *given, lanes)
        found[f"shared_prefix, {case}"] = {
            "gflop_before": gflop(one),
            "gflop": gflop(two),
            **ratio(one, two, pairs),
            "noise": ratio(one, one, pairs),
            "same_bits": torch.equal(one(), two()),
        }
    return found


@torch.inference_mode()
def true_layers(dtype: str, channels_last: bool, pairs: int) -> dict[str, Any]:
    """Compare blocks of Stable Diffusion 1.5's widths: the decoder's at half its size."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kind = getattr(torch, dtype)

    def cast(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind)
        return values.to(memory_format=layout) if len(shape) == 4 else values

    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder: Any = UpDecoderBlock2D(512, 512, num_layers=1, add_upsample=True)
        denoiser: Any = CrossAttnUpBlock2D(
            in_channels=320,
            out_channels=640,
            prev_output_channel=640,
            temb_channels=1280,
            num_layers=1,
            num_attention_heads=8,
            cross_attention_dim=768,
        )
    cases = {
        "decoder 512, 64x64": (decoder, (cast(1, 512, 64, 64),)),
        "UNet 640, 32x32": (
            denoiser,
            (cast(2, 640, 32, 32), (cast(2, 320, 32, 32),), cast(2, 1280), cast(2, 77, 768)),
        ),
    }
    found = {}
    for name, (block, arguments) in cases.items():
        plain = block.eval().requires_grad_(False).to(kind).to(memory_format=layout)
        own, phases = copy.deepcopy(plain), copy.deepcopy(plain)
        blocks.replace(own)
        blocks.replace(phases)
        holder = nn.Module()
        holder.decoder = phases
        rewrites.phase_upsample({"unet": nn.Module(), "vae": holder}, ())
        for key, (one, two) in {
            BLOCKS: (plain, own),
            "phase_upsample": (own, phases),
        }.items():
            first, second = partial(one, *arguments), partial(two, *arguments)
            found[f"{key}, {name}"] = {
                "gflop_before": gflop(first),
                "gflop": gflop(second),
                **ratio(first, second, pairs),
                "same_bits": torch.equal(first(), second()),
            }
    return found


def joined_norms(part: nn.Module, call: Callable[[], Any]) -> dict[str, Any]:
    """Count the norms that group_norm_silu joins, and what it saves in a call for one image."""
    found: list[tuple[bool, int]] = []  # whether SiLU follows, and the picture's values
    hooks = []
    for name, norm in part.named_modules():
        if isinstance(norm, nn.GroupNorm) and not name.endswith("group_norm"):  # of VAE attention
            silu = not name.endswith(".norm")  # of a transformer

            def add(_: Any, inputs: Any, __: Any, silu: bool = silu) -> None:
                found.append((silu, inputs[0].numel()))

            hooks.append(norm.register_forward_hook(add))
    call()
    for hook in hooks:
        hook.remove()
    counts: dict[str, Any] = {"norms": len(found), "with_silu": sum(silu for silu, _ in found)}
    for layout in ("channels_last", "contiguous"):
        costs = [(NORM_COSTS[layout, silu], 2 * values) for silu, values in found]
        launches = sum(cost[0] - JOINED_COST[0] for cost, _ in costs)
        saved = sum((cost[1] - JOINED_COST[1]) * size for cost, size in costs)
        counts[layout] = {"kernels_saved": launches, "gb_saved": round(saved / 1e9, 3)}
    return counts


class _Stop(Exception):
    """Ends a call."""


@torch.inference_mode()
def counted(name: str) -> dict[str, Any]:
    """Count a model's GFLOP a lane and image on the meta device, with each rewrite."""
    if name == models.EMBEDDED:
        parts = {k: v for k, v in models.parts(name).items() if k in ("unet", "vae")}
    else:
        with torch.device("meta"):
            size = models.SIZES[name]
            parts = {"unet": models._unet(size), "vae": models._vae(size)}
    parts = {key: part.to("meta") for key, part in parts.items()}
    width, side = parts["unet"].config.cross_attention_dim, models.pixels(name) // 8
    latents, text = (
        torch.empty(shape, device="meta") for shape in ((1, 4, side, side), (1, 77, width))
    )

    def unet() -> None:
        parts["unet"](latents, torch.ones(1, device="meta"), encoder_hidden_states=text)

    found = {"UNet": gflop(unet), "decoder": gflop(lambda: parts["vae"].decode(latents))}

    def stop(*_: Any) -> None:
        raise _Stop

    layers = dict(parts["unet"].named_modules())
    crossing = [layers[key] for key in layers if key.endswith("attn2")]
    hooks = [layer.register_forward_pre_hook(stop) for layer in crossing]

    def prefix() -> None:
        try:
            unet()
        except _Stop:
            return

    found["shared_prefix"] = gflop(prefix)
    for hook in hooks:
        hook.remove()
    for title, part, one in (
        ("UNet", parts["unet"], unet),
        ("decoder", parts["vae"].decoder, lambda: parts["vae"].decode(latents)),
    ):
        found[f"group_norm_silu, {title}: predicted"] = joined_norms(part, one)
    text_layers = [each for layer in crossing for each in (layer.to_k, layer.to_v)]
    found["text_kv"] = gflop(lambda: [layer(text) for layer in text_layers])
    rewrites.phase_upsample(parts, ())
    found["UNet, phase_upsample"] = gflop(unet)
    found["decoder, phase_upsample"] = gflop(lambda: parts["vae"].decode(latents))
    return found


@click.command(help=__doc__)
@click.option("--pairs", default=7, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(pairs: int, output: Path | None) -> None:
    """Measure the rewrites."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        f"gflop of {name}": counted(name) for name in ("sd15", models.EMBEDDED)
    }
    for title, row in found.items():
        print(f"{title}: {row}", flush=True)
    for title, (dtype, channels_last) in BUILDS.items():
        rows = whole_model(models.EMBEDDED, dtype, channels_last, pairs)
        rows |= true_layers(dtype, channels_last, max(3, pairs // 2))
        rows |= shared_prefix(models.EMBEDDED, dtype, channels_last, 4 * pairs)
        for key, row in rows.items():
            print(f"{title} {key}: {row}", flush=True)
        found[title] = rows
    report(output, threads=1, lanes=LANES, images=IMAGES, found=found, left_out=LEFT_OUT)


if __name__ == "__main__":
    main()
