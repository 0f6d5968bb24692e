"""Stable Diffusion 1.x: text and latents to images of f = 8, 4 channels (Rombach et al. 2022).

The driver imports this module, without torch; `load` imports the rest.
"""

from typing import TYPE_CHECKING, Any

from sdbatch.engine.limits import Capacity, Memory, ModelLimits
from sdbatch.models.find_model import Configs, Layout, ModelFiles
from sdbatch.models.identify import EDITING, INPAINTING, SD1, SD2, TEXT_TO_IMAGE, USES
from sdbatch.registry import REWRITES

if TYPE_CHECKING:
    from sdbatch.engine.family import Family
    from sdbatch.models.build import Build

VAE_FACTOR = 8  # pixels a latent: f in Rombach et al. 2022, sec. 4
LATENT_CHANNELS = 4
# On a CPU by benchmarks/lanes.py: large images gain nothing from a batch. Of small ones 32 lanes
# are 7 to 17 % faster than 16. On a GPU 32 lanes of 512x512 keep it busy by arithmetic; its memory
# is that of 1.07 G weights, and what a UNet lane and a decoded image take by their shapes. Not
# measured yet: `sdbatch tune` measures.
LIMITS = ModelLimits(
    multiple_of=VAE_FACTOR,
    side=512,
    capacity={
        "cpu": Capacity(lanes=1, most=32),
        "cuda": Capacity(lanes=32, most=512, memory=Memory(2.14e9, lane=68e6, image=0.4e9)),
    },
)
__all__ = ["LAYOUT", "LIMITS", "REWRITES", "load"]


def check_unet(config: dict[str, Any]) -> str:
    """Return which Stable Diffusion a UNet is, by its configuration.

    Raises:
        ValueError: with what the model is, if it needs more than text, latents and a picture.
    """
    width = config.get("cross_attention_dim")
    found = {
        name: value
        for name in ("in_channels", "time_cond_proj_dim", "addition_embed_type")
        if (value := config.get(name)) not in (None, LATENT_CHANNELS)
    }
    use = USES.get(found.get("in_channels", LATENT_CHANNELS), "other inputs")
    if use in LAYOUT.image_lanes:
        found.pop("in_channels", None)
    if width in (2048, 1280) or found.get("addition_embed_type") == "text_time":
        words = "SDXL"
    elif found:
        words = "a model with more inputs" if use in LAYOUT.image_lanes else f"a model for {use}"
    else:
        return SD2 if width == 1024 else SD1
    needs = ", ".join(f"{name} {value}" for name, value in found.items()) or f"text width {width}"
    way = "" if "time_cond_proj_dim" not in found else "; use the LoRA of an LCM, in model.loras"
    raise ValueError(f"is {words} ({needs}): must be a Stable Diffusion 1.x for text to image{way}")


def _base_of(configs: Configs) -> str:
    return check_unet(configs["unet"])


def _use_of(configs: Configs) -> str:
    return USES[configs["unet"].get("in_channels") or LATENT_CHANNELS]


LAYOUT = Layout(
    weights=("text_encoder", "unet", "vae"),
    configs=("tokenizer", "scheduler"),
    base=SD1,
    base_of=_base_of,
    image_lanes={TEXT_TO_IMAGE: 2, INPAINTING: 2, EDITING: 3},
    use_of=_use_of,
)


def load(files: ModelFiles, build: "Build") -> "Family":
    """Load the model; raises a ModelError if the files are not a Stable Diffusion 1.x."""
    from sdbatch.models.sd1.family import StableDiffusion1
    from sdbatch.models.sd1.loading import load as load_parts

    return StableDiffusion1(load_parts(files, build))
