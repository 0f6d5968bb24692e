"""`python -m training.table FILE`: a prompt table of 200 scenes, from a seed.

Each prompt comes with what it asks for, as a labelled dataset has it: the labels travel into the
output with the images.
"""

import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.shapes import captions, world
from sdbatch.shapes.world import Scene

ROWS = 200


def rows(count: int, seed: str) -> pa.Table:
    """Return a prompt table of `count` scenes."""
    chance = random.Random(seed)
    scenes = [world.imagine(chance) for _ in range(count)]
    return pa.Table.from_pylist(
        [
            {"id": f"scene-{number:04d}", "prompt": captions.say(scene, chance), **labels(scene)}
            for number, scene in enumerate(scenes)
        ]
    )


def labels(scene: Scene) -> dict[str, Any]:
    """Return what a scene's first group is, and whether training left that out."""
    first = scene.groups[0]
    return {
        "shape": first.shape,
        "colour": first.colour,
        "count": first.count,
        "size": first.size,
        "background": scene.background,
        "groups": len(scene.groups),
        "held_out": world.is_held_out(first),
    }


if __name__ == "__main__":
    pq.write_table(rows(ROWS, "table"), Path(sys.argv[1]))
