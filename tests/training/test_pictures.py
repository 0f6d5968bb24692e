"""The pictures and masks of the example job: committed as their code makes them."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.pictures import make_pictures

FOLDER = Path(__file__).parents[2] / "jobs" / "composition"


def test_the_committed_pictures_equal_those_that_their_code_makes():
    pictures = make_pictures()
    assert {path.stem for path in FOLDER.iterdir()} == set(pictures)
    for name, pixels in pictures.items():
        assert np.array_equal(np.asarray(Image.open(FOLDER / f"{name}.png")), pixels), name
