"""What happens to images that the safety checker flags, in a batch run and in the service."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

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
        for i in flagged:
            result = self._result(rows.select(schema.OUTPUT_NAMES).slice(i, 1).to_pylist()[0])
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
        # Its own size: that of the row is the first pass's, or of what is cut out of a picture.
        width, height = Image.open(io.BytesIO(row["image"]["bytes"])).size
        file = encode_image(black(height, width), row, self._encoding)
        image = {"bytes": file, "path": row["image"]["path"]}
        return {"image": image, "sha256": hashlib.sha256(file).hexdigest()}
