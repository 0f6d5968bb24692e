"""A scorer that fails for the pictures of a red circle."""

import pyarrow as pa

COLUMNS = (pa.field("fidelity", pa.float64()),)


def score(prompt, picture):
    if "red circle" in prompt:
        raise ZeroDivisionError("no pixels")
    return {"fidelity": 0.5}
