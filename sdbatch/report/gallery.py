"""The gallery: one HTML page with the first images of an output; it loads no other file."""

import base64
import html
import io
import itertools
from collections.abc import Iterable
from typing import Any

from sdbatch.job import Job
from sdbatch.output.reader import Images, open_picture
from sdbatch.output.receipts import Receipt
from sdbatch.storage import Store

MAX_IMAGES = 60
MAX_CHARACTERS = 500  # of a prompt or a name on the page
THUMBNAIL_SIDE = 192  # pixels of a thumbnail's longer side
_COLUMNS = ("key", "image", "prompt", "seed", "sampler", "num_inference_steps", "guidance_scale")
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); gap: 1.2rem }
figure { margin: 0 } figcaption { word-break: break-word }
img { width: 192px; image-rendering: pixelated }
small { color: #666 }
"""


def gallery_page(store: Store, job: Job, receipts: Iterable[Receipt]) -> bytes:
    """Return the page with the first MAX_IMAGES images of the output."""
    images = Images(store, job, tuple(sorted(receipts, key=lambda receipt: receipt.shard)))
    figures = [_figure(row) for row in itertools.islice(images.rows(_COLUMNS), MAX_IMAGES)]
    title, model = _escape(job.title), _escape(job.model.name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>The first {len(figures)} of {len(images):,} images drawn by {model}, a trained model."
        f"</p><main>{''.join(figures)}</main></html>\n"
    )
    return page.encode()


def _escape(text: str) -> str:
    """Return a text for the page; " ..." marks a cut."""
    cut = len(text) > MAX_CHARACTERS
    return html.escape(f"{text[:MAX_CHARACTERS]} ..." if cut else text)


def _figure(row: dict[str, Any]) -> str:
    """Return an image and its caption as HTML."""
    thumbnail = open_picture(row)
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    settings = (
        f"{row['sampler']} {row['num_inference_steps']} steps, guidance {row['guidance_scale']:g}"
    )
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{row["key"]}">'
        f"<figcaption>{_escape(row['prompt'])}<br><small>{row['key']}, seed {row['seed']}, "
        f"{settings}</small></figcaption></figure>"
    )
