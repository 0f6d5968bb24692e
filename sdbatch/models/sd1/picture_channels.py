"""What a UNet for inpainting or editing sees of a picture, as channels that join the latents.

For inpainting: the mask, 1 where the picture is drawn anew, and the latents of the picture, grey
under the mask. A row without a mask is drawn anew everywhere. For editing by instruction: the
latents of the picture, unscaled; the third lane of an image has zeros instead. diffusers draws an
edit from noise in all of its steps, AUTOMATIC1111 as any picture, by strength and mask.

Sources: diffusers' StableDiffusionInpaintPipeline with 9 channels and
StableDiffusionInstructPix2PixPipeline; Brooks et al. 2023 (InstructPix2Pix), sec. 3.2;
AUTOMATIC1111's modules/processing.py, edit_image_conditioning and inpainting_image_conditioning.

H, W = image height and width in pixels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdbatch.engine.request import Request
from sdbatch.models.identify import EDITING, INPAINTING, TEXT_TO_IMAGE
from sdbatch.sampling import PICTURE_KEYS, Sampling

MASKED = "masked"  # the name of the picture without what is under the mask
GREY = 127.5  # the middle of the counts, which is 0 to the VAE
# The sampling keys that models of each use honour.
KEYS: Mapping[str, frozenset[str]] = {
    TEXT_TO_IMAGE: PICTURE_KEYS,
    INPAINTING: PICTURE_KEYS,
    EDITING: PICTURE_KEYS | {"image_guidance_scale"},
}
_WAY = "Or set compat to a1111"


def check(request: Request, use: str) -> None:
    """Raise a ValueError if a model of this use cannot draw what the request gives it."""
    if use == EDITING:
        _check_edit(request)
    if request.compat == "a1111":
        return
    if use == EDITING:
        _check_whole_edit(request)
    if use == INPAINTING and request.mask_fill in ("noise", "nothing"):
        raise ValueError(
            f"mask_fill = {request.mask_fill!r}: must be original or fill, as a model for "
            f"inpainting does not see the latents under the mask. {_WAY}"
        )


def _check_edit(request: Request) -> None:
    if "image" not in request.inputs:
        raise ValueError(
            "image = none: must be a picture, as this model edits pictures by instruction. Give "
            "the row one, or choose another model"
        )
    if request.hires_scale > 1:
        raise ValueError(
            f"hires_scale = {request.hires_scale:g}: must be 1, as this model edits pictures"
        )


def _check_whole_edit(request: Request) -> None:
    """Raise a ValueError for what an edit that begins with noise alone does not have."""
    if "mask" in request.inputs:
        raise ValueError(
            f"mask_image = a mask: must be none, as this model edits whole pictures. Leave it out, "
            f"or choose a model for inpainting. {_WAY}"
        )
    for key in ("strength", "sample_posterior"):
        value, default = getattr(request, key), Sampling.model_fields[key].default
        if value != default:
            raise ValueError(
                f"{key} = {value!r}: must be {default!r}, its default, as an edit begins with "
                f"noise alone. {_WAY}"
            )


def begins_with_picture(request: Request, use: str) -> bool:
    """Tell whether a request's first latents are those of its picture with noise.

    With the whole strength, diffusers' inpainting begins with noise alone, and its image to image
    with what little of the picture the noise leaves.
    """
    if "image" not in request.inputs:
        return False
    if request.second_pass or request.compat == "a1111":
        return True
    if use == EDITING:
        return False
    paints = use == INPAINTING or "mask" in request.inputs
    return not paints or request.strength < 1


def to_encode(request: Request, use: str) -> dict[str, NDArray[Any]]:
    """Return the pictures that a request needs as latents, by name: (H, W, 3), counts of 255."""
    image = request.inputs.get("image")
    if image is None:
        return {}
    mask = request.inputs.get("mask")
    pictures: dict[str, NDArray[Any]] = {}
    if use != INPAINTING or begins_with_picture(request, use):
        pictures["image"] = image
    if use == INPAINTING and mask is not None:
        pictures[MASKED] = np.where(mask[..., None] >= 128, np.float16(GREY), image)
    return pictures
