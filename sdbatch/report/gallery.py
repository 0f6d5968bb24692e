"""A page to look at the first images of an output: one HTML file, nothing loaded from elsewhere."""

import base64
import html
import io
import itertools
from collections.abc import Iterable
from typing import Any

from sdbatch.job import Job
from sdbatch.output.reader import Images, picture
from sdbatch.output.receipts import Receipt
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
    images = Images(store, job, tuple(sorted(every, key=lambda receipt: receipt.shard)))
    figures = [_figure(row) for row in itertools.islice(images.rows(), IMAGES)]
    title, model = html.escape(job.title), html.escape(job.model.name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>The first {len(figures)} of {len(images):,} images drawn by {model}, a trained model."
        f"</p><main>{''.join(figures)}</main></html>\n"
    )
    store.put(PAGE, page.encode())


def _figure(row: dict[str, Any]) -> str:
    small = picture(row)
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
