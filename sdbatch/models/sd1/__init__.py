"""Stable Diffusion 1.x: text and latents to images of f = 8, 4 channels (Rombach et al. 2022).

The driver imports this module, without torch; `load` imports the rest.
"""

from typing import TYPE_CHECKING

from sdbatch.engine.limits import Capacity, ModelLimits
from sdbatch.models.find_model import Layout, ModelFiles

if TYPE_CHECKING:
    from sdbatch.engine.family import Family
    from sdbatch.models.build import Build

VAE_FACTOR = 8  # pixels a latent: f in Rombach et al. 2022, sec. 4
# On a CPU by benchmarks/lanes.py: large images gain nothing from a batch. Of small ones 32 lanes
# are 7 to 17 % faster than 16. On a GPU 32 lanes of 512x512
# keep it busy by arithmetic and leave room in its memory: not measured yet.
LIMITS = ModelLimits(
    multiple_of=VAE_FACTOR,
    side=512,
    capacity={"cpu": Capacity(lanes=1, most=32), "cuda": Capacity(lanes=32, most=64)},
)
LAYOUT = Layout(
    weights=("text_encoder", "unet", "vae"),
    configs=("tokenizer", "scheduler"),
    first_key="model.diffusion_model.input_blocks.0.0.weight",
)


def load(files: ModelFiles, build: "Build") -> "Family":
    """Load the model; raises a ModelError if the files are not a Stable Diffusion 1.x."""
    from sdbatch.models.sd1.family import StableDiffusion1
    from sdbatch.models.sd1.loading import load as load_parts

    return StableDiffusion1(load_parts(files, build))
