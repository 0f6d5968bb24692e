"""Picture files for tests of the tables that name them."""

import hashlib
import io

import numpy as np
from PIL import Image


def save(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Return pixels as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return random pixels, (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
