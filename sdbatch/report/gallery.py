"""A page to look at the first images of an output: one HTML file, nothing loaded from elsewhere."""

import base64
import html
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from sdbatch import formats
from sdbatch.job import Job
from sdbatch.receipts import DATA, Receipt
from sdbatch.storage import Store

FOLDER = "gallery"
PAGE = f"{FOLDER}/index.html"
IMAGES = 60
SIDE = 192  # pixels of a thumbnail's longer side
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); gap: 1.2rem }
figure { margin: 0 } figcaption { word-break: break-word }
img { width: 192px; image-rendering: pixelated }
small { color: #666 }
"""


def write(store: Store, job: Job, every: Iterable[Receipt]) -> None:
    """Write gallery/index.html with the first IMAGES images of the output."""
    receipts = list(every)
    count = sum(receipt.images for receipt in receipts)
    figures = [_figure(row) for row in itertools.islice(_rows(store, receipts), IMAGES)]
    title = html.escape(job.title)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>The first {len(figures)} of {count:,} images drawn by {html.escape(job.model.name)}, "
        f"a trained model.</p><main>{''.join(figures)}</main></html>\n"
    )
    store.put(PAGE, page.encode())


def _rows(store: Store, receipts: list[Receipt]) -> Iterator[dict[str, Any]]:
    for receipt in sorted(receipts, key=lambda receipt: receipt.shard):
        for file in receipt.files:
            if file["name"].startswith(f"{DATA}/"):
                with store.open(file["name"]) as opened:
                    yield from formats.read(opened, file["name"])


def _figure(row: dict[str, Any]) -> str:
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    said = (
        f"{row['sampler']} {row['num_inference_steps']} steps, guidance {row['guidance_scale']:g}"
    )
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{row["key"]}">'
        f"<figcaption>{html.escape(row['prompt'])}<br><small>{row['key']}, seed {row['seed']}, "
        f"{said}</small></figcaption></figure>"
    )
