"""Stable Diffusion's safety checker, with the scores that diffusers' own class discards.

n = images, H/W = their pixels, K = concepts (17 in the published checker).
"""

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
    cosine_distance,
)
from torch.nn.functional import interpolate
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from sdbatch.models import find_model
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.weights import check_finite, load_complete, load_errors

CARE = 0.01  # how much a concept that needs special care lowers all thresholds


def load(files: ModelFiles, build: Build) -> "SafetyChecker | None":
    """Load the model's safety checker, as diffusers does; None if it has none.

    Raises:
        ModelError: its files are not a complete checker.
    """
    path, where = files.checker, {}
    if path is None:
        return None
    if path == find_model.OWN_CHECKER:
        path = files.root
        where = {"subfolder": find_model.CHECKER, "variant": files.variants.get(find_model.CHECKER)}
        where |= {"revision": files.revision} if files.kind == "hub" else {}
    with load_errors("safety.checker", path, "It must be complete; or set safety.checker to none."):
        checker = load_complete(StableDiffusionSafetyChecker, path, **where)
        checker.to(build.device, getattr(torch, build.dtype))
        check_finite(checker, "the checker")  # a NaN is above no threshold, so it flags nothing
    return SafetyChecker(checker).to(build.device, getattr(torch, build.dtype))


class SafetyChecker:
    """Scores images by concept. Always called with groups of one size, as the VAE is."""

    def __init__(self, checker: Any) -> None:
        self._checker = checker.requires_grad_(False).eval()
        self._side = checker.config.vision_config.image_size
        self._mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
        self._std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)

    def to(self, device: str, dtype: torch.dtype) -> "SafetyChecker":
        """Move the weights."""
        self._checker.to(device, dtype)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return how far above its threshold each concept is in each image.

        Args:
            pixels: (n, H, W, 3) uint8.

        Returns:
            (n, K) float32 of three decimals; one above 0 flags the image.

        Source: diffusers' StableDiffusionSafetyChecker.forward.
        """
        checker = self._checker
        pooled = checker.vision_model(self._prepared(pixels))[1]
        embedding = checker.visual_projection(pooled)
        care = cosine_distance(embedding, checker.special_care_embeds).float()
        care = (care - checker.special_care_embeds_weights.float()).round(decimals=3)
        lowered = CARE * (care > 0).any(1, keepdim=True)
        concepts = cosine_distance(embedding, checker.concept_embeds).float()
        scores = concepts - checker.concept_embeds_weights.float() + lowered
        rounded: torch.Tensor = scores.round(decimals=3)
        return rounded

    def _prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """Resize the shorter side, cut out the middle and normalise, as CLIPImageProcessor does."""
        images = pixels.permute(0, 3, 1, 2).float()
        height, width = images.shape[2:]
        short = min(height, width)
        size = (self._side * height // short, self._side * width // short)
        images = interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        images = images[:, :, top : top + self._side, left : left + self._side] / 255
        dtype = next(self._checker.parameters()).dtype
        return ((images - self._mean) / self._std).to(dtype)
