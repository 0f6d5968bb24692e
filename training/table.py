"""`python -m training.table FILE`: write a prompt table of 200 random scenes, from a fixed seed.

Each row also has labels that describe its scene, as in a labelled dataset. The output of a job
contains them next to the images.
"""

import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.shapes.captions import write_caption
from sdbatch.shapes.world import Scene, is_held_out, random_scene

ROW_COUNT = 200


def prompt_table(count: int, seed: str) -> pa.Table:
    """Return a prompt table of `count` random scenes."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return pa.Table.from_pylist(
        [
            {
                "id": f"scene-{number:04d}",
                "prompt": write_caption(scene, rng),
                **scene_labels(scene),
            }
            for number, scene in enumerate(scenes)
        ]
    )


def scene_labels(scene: Scene) -> dict[str, Any]:
    """Return the attributes of the first group, and whether training holds its pair out."""
    first = scene.groups[0]
    return {
        "shape": first.shape,
        "colour": first.colour,
        "count": first.count,
        "size": first.size,
        "background": scene.background,
        "groups": len(scene.groups),
        "held_out": is_held_out(first),
    }


if __name__ == "__main__":
    pq.write_table(prompt_table(ROW_COUNT, "table"), Path(sys.argv[1]))
