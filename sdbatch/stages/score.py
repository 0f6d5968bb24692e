"""A stage of the job's `stages` section that adds scores: `{score: shapes}`.

A scorer is a module of registry.SCORERS with

    COLUMNS                  the Arrow fields that it adds
    score(prompt, picture)   the values of some of them, for one picture, (H, W, 3) uint8
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from sdbatch import registry
from sdbatch.errors import one_line
from sdbatch.stages.base import Needs, Stage, replace_columns


class Score(Stage):
    """Scores the images of a shard; a row that has no image, or whose scoring fails, has none."""

    name = "score"
    needs = Needs(columns=("prompt", "image", "error"))

    def __init__(self, scorer: str) -> None:
        self._scorer = scorer
        self.adds = pa.schema(registry.load(registry.SCORERS[scorer]).COLUMNS)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Append the columns of the scorer."""
        errors = rows["error"].to_pylist()
        scores: list[dict[str, Any]] = [{} for _ in errors]
        for i, (prompt, image) in enumerate(zip(rows["prompt"], rows["image"], strict=True)):
            if image["bytes"].is_valid:
                try:
                    scores[i] = self._score(prompt.as_py(), _pixels(image))
                except Exception as error:  # noqa: BLE001  caused by this row alone
                    errors[i] = f"score {self._scorer}: {type(error).__name__}: {one_line(error)}"
        for field in self.adds:
            values = [each.get(field.name) for each in scores]
            rows = rows.append_column(field, pa.array(values, field.type))
        return replace_columns(rows, {"error": pa.array(errors, pa.string())})

    def _score(self, prompt: str, picture: Any) -> dict[str, Any]:
        found: dict[str, Any] = registry.load(registry.SCORERS[self._scorer]).score(prompt, picture)
        return found


def make(scorer: str) -> Score:
    """Return the stage of a `score` entry."""
    return Score(scorer)


def _pixels(image: Any) -> Any:
    with Image.open(io.BytesIO(image["bytes"].as_buffer())) as picture:
        return np.asarray(picture.convert("RGB"))
