"""What a Stable Diffusion 1.5 image costs, and how fast one H100 could draw it.

    python benchmarks/roofline.py

FLOP are counted from the model's true configuration, two for a multiplication with its addition,
attention included; no weights, no device. Predicted are the seconds of one H100 in float16, from
the UNet's and the VAE's milliseconds below. They are not measured. docs/speed.md has the tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import click
import models

PEAK = 989.0  # TFLOP/s of an H100 or H200 in float16, dense, as NVIDIA publishes it
CEILING = 790.0  # TFLOP/s that a large matrix product reaches on it; gpu.py measures the card's own
KINDS = {"convolution": "convolutions", "bmm": "attention", "mm": "linear layers"}  # operators


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a card at CEILING."""

    unet_ms: float  # a lane and step
    vae_ms: float  # a decoded image

    def seconds(self, lane_steps: float, images: float) -> float:
        """Return the seconds that so many lanes of UNet calls and decoded images take."""
        return (lane_steps * self.unet_ms + images * self.vae_ms) / 1000


@dataclass(frozen=True)
class Published:
    """A measurement of others: UNet calls of guided images of 512x512 in float16."""

    what: str
    peak: float  # TFLOP/s of the card in float16, dense, as NVIDIA publishes it
    batch: int  # images
    steps_per_s: float
    source: str

    @property
    def tflops(self) -> float:
        """Return the TFLOP/s that the UNet reaches."""
        return self.steps_per_s * self.batch * 2 * models.flop("sd15")[0]


_DIFFUSERS = (
    "https://github.com/huggingface/diffusers/blob/2c529b75bbd25e4c69348bbabd0a1a842d540193"
    "/docs/source/en/optimization/torch2.0.md"
)
_STABLE_FAST = "https://github.com/chengzeyi/stable-fast"
PUBLISHED = (
    Published("A100, diffusers, eager, batch 16", 312, 16, 3.6, _DIFFUSERS),
    Published("A100, diffusers, compiled, batch 16", 312, 16, 4.68, _DIFFUSERS),
    Published("H100, diffusers, eager, batch 1", PEAK, 1, 54.5, _STABLE_FAST),
    Published("H100, stable-fast, batch 1", PEAK, 1, 104.6, _STABLE_FAST),
)
# Predictions: an H100 is harder to fill than an A100, and large batches fill it best.
EAGER = Speed(2.98, 13.5)
COMPILED = Speed(2.12, 9.6)


@dataclass(frozen=True)
class Drawing:
    """How an image is drawn."""

    name: str
    steps: int
    guided: bool = True

    @property
    def lane_steps(self) -> int:
        """Return the rows of all UNet calls for an image."""
        return self.steps * (2 if self.guided else 1)


DRAWINGS = (
    Drawing("50 steps, guided", 50),
    Drawing("25 steps, guided", 25),
    Drawing("8 steps, guided", 8),
    Drawing("4 steps, without guidance (LCM)", 4, guided=False),
)


def tflop(drawing: Drawing) -> float:
    """Return the TFLOP of an image."""
    unet, vae = models.flop("sd15")
    return drawing.lane_steps * unet + vae


def predicted(drawing: Drawing, speed: Speed) -> tuple[float, float]:
    """Return images/s of one H100, and the share of its published peak."""
    rate = 1 / speed.seconds(drawing.lane_steps, 1)
    return rate, rate * tflop(drawing) / PEAK


def costs() -> str:
    """Return the FLOP of a UNet call and of a decoding, by kind, as a Markdown table."""
    lines = ["| | GFLOP | " + " | ".join(KINDS.values()) + " |", "|---" * 5 + "|"]
    parts = ("UNet, one lane and step", "VAE, one image decoded")
    for name, operations in zip(parts, models.operations("sd15"), strict=True):
        total = sum(operations.values())
        shares = [f"{_of_kind(operations, kind) / total:.1%}" for kind in KINDS]
        lines.append(f"| {name} | {1000 * total:,.1f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def _of_kind(operations: Mapping[str, float], kind: str) -> float:
    found = [next(each for each in KINDS if each in name) for name in operations]
    values = zip(found, operations.values(), strict=True)
    return sum(value for each, value in values if each == kind)


def rates() -> str:
    """Return the roofline and the predictions as a Markdown table."""
    lines = [
        f"| an image of 512x512 | TFLOP | roof at {CEILING:.0f} TFLOP/s | predicted, eager "
        "| predicted, compiled |",
        "|---" * 5 + "|",
    ]
    for drawing in DRAWINGS:
        cost = tflop(drawing)
        cells = [f"{drawing.name}", f"{cost:.1f}", f"{CEILING / cost:.1f} images/s"]
        for speed in (EAGER, COMPILED):
            rate, share = predicted(drawing, speed)
            cells.append(f"{rate:.1f} images/s, {share:.2f} of the peak")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def published() -> str:
    """Return what others have measured, as shares of the cards' peaks, as a Markdown table."""
    lines = ["| published | steps/s | UNet TFLOP/s | of the peak |", "|---" * 4 + "|"]
    for each in PUBLISHED:
        cells = (f"{each.tflops:.0f}", f"{each.tflops / each.peak:.2f}")
        lines.append(f"| [{each.what}]({each.source}) | {each.steps_per_s} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
def main() -> None:
    """Print the tables."""
    print(costs(), rates(), published(), sep="\n", end="")


if __name__ == "__main__":
    main()
