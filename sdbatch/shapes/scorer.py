"""The judge as a scorer: what it reads from a picture becomes columns of the dataset."""

from typing import Any

import pyarrow as pa

from sdbatch.shapes import judge
from sdbatch.shapes.picture import Pixels

COLUMNS = (
    pa.field("fidelity", pa.float64()),  # the part of the prompt's attributes that hold, 0 to 1
    # whether each of them holds; null: the prompt leaves it open
    *(pa.field(f"fidelity_{name}", pa.bool_()) for name in judge.ATTRIBUTES),
)


def score(prompt: str, picture: Pixels) -> dict[str, Any]:
    """Return the values of COLUMNS; none if the prompt names no shape of the world."""
    verdict = judge.judge_picture(prompt, picture)
    if verdict is None:
        return {}
    attributes = {f"fidelity_{name}": holds for name, holds in verdict.items()}
    return {"fidelity": judge.fidelity(verdict), **attributes}
