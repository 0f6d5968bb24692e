"""`sdbatch score`: how well the images of an output show what their prompts ask for.

The judge reads pictures of the embedded model's world. What it finds becomes quality columns
beside the data: scores.parquet, one row an image, joined by `key`.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdbatch.cores import cores
from sdbatch.errors import StorageError
from sdbatch.output.reader import open_images, picture, shard_rows
from sdbatch.output.receipts import Receipt
from sdbatch.shapes import judge
from sdbatch.storage import Store

SCORES_FILE = "scores.parquet"
SCORES = pa.schema(
    [
        ("key", pa.string()),
        ("sha256", pa.string()),  # of the image file that was judged
        ("fidelity", pa.float64()),  # the part of what the prompt asks for that holds, 0 to 1
        # Whether it holds; null: the prompt leaves it open.
        *((f"fidelity_{name}", pa.bool_()) for name in judge.ATTRIBUTES),
    ]
)
COLUMNS = tuple(SCORES.names[2:])
DRAWN_BY = "builtin:shapes"


@dataclass(frozen=True)
class Scores:
    """The scores of an output: of the images whose prompts the judge can read."""

    output: str
    model: str
    images: int
    unread: int  # images whose prompts name no shape of the world: not scored
    fidelity: float | None  # mean over the images; None: no prompt could be read
    attributes: dict[str, tuple[int, int]]  # name -> images where it holds, images asked for it

    def text(self) -> str:
        """Return the scores for people."""
        lines = [f"{self.output}: {self.images - self.unread:,} of {self.images:,} images scored"]
        if self.fidelity is not None:
            lines.append(
                f"  {'fidelity':<12}{self.fidelity:>7.1%}  of all that was asked, on average"
            )
        lines += [
            f"  {name:<12}{held / asked:>7.1%}  of {asked:,} images asked for it"
            for name, (held, asked) in self.attributes.items()
        ]
        if self.unread:
            lines.append(f"  {self.unread:,} not scored: their prompts name no shape of the world")
        if self.model != DRAWN_BY:
            lines.append(f"  the judge reads pictures as {DRAWN_BY} draws them, not {self.model}'s")
        lines.append(f"  image by image: {self.output}/{SCORES_FILE}")
        return "\n".join(lines)


def score(store: Store) -> Scores:
    """Judge every image of the output, write scores.parquet and return the sums.

    Raises:
        StorageError: there is no output, or it has no image yet.
    """
    images = open_images(store)
    store.check_writable()
    table = pa.concat_tables(_shards(store, images.receipts))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put(SCORES_FILE, sink.getvalue().to_pybytes())
    return summary(store.url, images.job.model.path, table)


def summary(output: str, model: str, scores: pa.Table) -> Scores:
    """Sum up a table of SCORES."""
    counts = {}
    for name in judge.ATTRIBUTES:
        held = scores[f"fidelity_{name}"]
        counts[name] = (pc.sum(held).as_py() or 0, len(held) - held.null_count)
    return Scores(
        output=output,
        model=model,
        images=len(scores),
        unread=scores["fidelity"].null_count,
        fidelity=pc.mean(scores["fidelity"]).as_py(),
        attributes={name: count for name, count in counts.items() if count[1]},
    )


def read(store: Store) -> dict[str, dict[str, Any]]:
    """Return the scores that the output has, by the image's sha256; none if it was never scored.

    Raises:
        StorageError: scores.parquet is not what `score` writes.
    """
    data = store.find(SCORES_FILE)
    if data is None:
        return {}
    try:
        table = pq.read_table(pa.BufferReader(data)).select(SCORES.names).cast(SCORES)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StorageError(
            f"{store.where(SCORES_FILE)} = no scores ({' '.join(str(error).split())}): must be as "
            f"they were written. Run `sdbatch score {store.url}` again."
        ) from error
    return {row["sha256"]: row for row in table.to_pylist()}


def _shards(store: Store, every: Sequence[Receipt]) -> Iterator[pa.Table]:
    count = min(len(every), cores())
    if count == 1:
        yield from map(partial(_score, store), every)
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        yield from pool.map(partial(_score, store), every)


def _score(store: Store, receipt: Receipt) -> pa.Table:
    """Judge the images of one shard."""
    found = []
    for row in shard_rows(store, receipt, ["key", "sha256", "prompt", "image"]):
        verdict = judge.judge(row["prompt"], np.asarray(picture(row)))
        scores = {f"fidelity_{name}": holds for name, holds in (verdict or {}).items()}
        part = None if verdict is None else judge.fidelity(verdict)
        found.append({"key": row["key"], "sha256": row["sha256"], "fidelity": part, **scores})
    return pa.Table.from_pylist(found, schema=SCORES)
