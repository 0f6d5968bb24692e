"""Photos of 12 megapixels take the memory of one or two, however many are read."""

import subprocess
import sys
from pathlib import Path

import pytest

PHOTO = 4000 * 3000 * 4 / 2**20  # MiB: Pillow keeps 4 bytes a pixel

READ = """
import sys
import numpy as np
from PIL import Image
from sdbatch.inputs.prepare import Prepared, prepare
from sdbatch.sampling import Sampling
from tests.inputs.files import colours, save

photo = save(Image.fromarray(colours(40, 30)).resize((4000, 3000)), "JPEG")
mask = Image.new("L", (4000, 3000))
mask.paste(255, (1000, 1000, 1600, 1500))
mask = save(mask)
sampling = Sampling(only_masked=sys.argv[1] == "only_masked", mask_blur=4)


def draw():
    prepared = prepare(sampling, photo, None if sys.argv[1] == "picture" else mask)
    prepared = Prepared.from_bytes(prepared.to_bytes())
    prepared.finish(prepared.arrays["image"])


def memory(key):
    with open("/proc/self/status") as status:
        return int(status.read().split(key)[1].split()[0]) / 1024


prepare(Sampling(), save(colours(8, 8)))  # imports what it needs
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak is now what there is
before = memory("VmRSS:")
draw()
draw()
first = memory("VmHWM:")
for _ in range(3):
    draw()
print(first - before, memory("VmHWM:") - first)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says the peak")
@pytest.mark.parametrize(("kind", "photos"), [("picture", 1), ("mask", 1.5), ("only_masked", 2.5)])
def test_memory_is_that_of_a_photo_or_two_and_does_not_grow(kind, photos):
    command = [sys.executable, "-c", READ, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, growth = map(float, done.stdout.split())
    assert peak < photos * PHOTO
    assert growth < PHOTO / 2
