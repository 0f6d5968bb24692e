"""What happens to images that the safety checker flags, in a batch run and in the service."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdbatch import schema
from sdbatch.output.image_file import Encoding, encode_image
from sdbatch.stages.base import Needs, Stage, replace_columns, replace_images


@dataclass(frozen=True)
class SafetyPolicy:
    """flag: mark the image; blank: a black image instead; drop: the row fails."""

    policy: Literal["flag", "blank", "drop"]

    def reason_to_drop(self, nsfw: bool | None, scores: Any) -> str | None:
        """Return why an image is dropped; None if it is not."""
        if self.policy != "drop" or not nsfw:
            return None
        return f"The safety checker flagged the image with a score of {max(scores or (0,)):.3f}."

    def hides(self, nsfw: bool | None) -> bool:
        """Tell whether nobody may see an image, or a preview of it."""
        return bool(nsfw) and self.policy != "flag"


def black(height: int, width: int) -> NDArray[np.uint8]:
    """Return the image that is shown for a hidden one: (height, width, 3)."""
    return np.zeros((height, width, 3), np.uint8)


class ApplySafety(Stage):
    """Applies the policy to a shard's images; a dropped image is a failed row."""

    name = "safety"
    needs = Needs(columns=schema.OUTPUT_NAMES)

    def __init__(self, policy: SafetyPolicy, encoding: Encoding) -> None:
        self._policy = policy
        self._encoding = encoding

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the columns of flagged images."""
        flagged = [i for i, nsfw in enumerate(rows["nsfw"].to_pylist()) if nsfw]
        if not flagged:
            return rows
        fields = {field.name: field.type for field in (*schema.DRAWN, schema.ERROR)}
        columns = {name: rows[name].to_pylist() for name in fields}
        images: dict[int, dict[str, Any] | None] = {}
        others = rows.select([name for name in schema.OUTPUT_NAMES if name != "image"])
        for i in flagged:
            row = others.slice(i, 1).to_pylist()[0]
            result = self._result({**row, "path": rows["image"][i]["path"].as_py()})
            for name, value in result.items():
                if name == "image":
                    images[i] = value
                else:
                    columns[name][i] = value
        rows = replace_images(rows, images)
        return replace_columns(
            rows, {name: pa.array(values, fields[name]) for name, values in columns.items()}
        )

    def _result(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the new values of a flagged row."""
        reason = self._policy.reason_to_drop(row["nsfw"], row["nsfw_scores"])
        if reason is not None:
            return {**{field.name: None for field in schema.RESULTS}, "error": reason}
        if not self._policy.hides(row["nsfw"]):
            return {}
        file = encode_image(black(row["height"], row["width"]), row, self._encoding)
        image = {"bytes": file, "path": row["path"]}
        return {"image": image, "sha256": hashlib.sha256(file).hexdigest()}
