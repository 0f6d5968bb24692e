"""`sdbatch score`: how well the images of an output match their prompts.

The scorer reads pictures of the embedded model's world: shapes on a background. The scores go to
scores.parquet, one row per image; join it with the dataset by `key` or `sha256`.
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
from sdbatch.errors import StorageError, one_line
from sdbatch.output import names
from sdbatch.output.reader import open_images, open_picture, shard_rows
from sdbatch.output.receipts import Receipt
from sdbatch.registry import EMBEDDED_MODEL
from sdbatch.shapes import judge, scorer
from sdbatch.storage import Store

# `sha256` is of the image file that was scored.
SCHEMA = pa.schema([("key", pa.string()), ("sha256", pa.string()), *scorer.COLUMNS])
SCORE_COLUMNS = tuple(field.name for field in scorer.COLUMNS)


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of an output, summed up over the images whose prompts the scorer can read."""

    output: str
    model: str
    images: int
    unread: int  # images without scores: their prompts name no known shape
    fidelity: float | None  # mean over the images; None: no image has scores
    # name -> images where the attribute holds, images whose prompt requests it
    attributes: dict[str, tuple[int, int]]

    def text(self) -> str:
        """Return the summary for people."""
        lines = [f"{self.output}: {self.images - self.unread:,} of {self.images:,} images scored"]
        if self.fidelity is not None:
            lines.append(
                f"  {'fidelity':<12}{self.fidelity:>7.1%}  of the requested attributes, on average"
            )
        for name, (holding, requested) in self.attributes.items():
            lines.append(
                f"  {name:<12}{holding / requested:>7.1%}  of {requested:,} images whose prompt "
                f"requests it"
            )
        if self.unread:
            lines.append(f"  {self.unread:,} not scored: their prompts name no known shape")
        if self.model != EMBEDDED_MODEL:
            lines.append(
                f"  the scorer is made for images of {EMBEDDED_MODEL}, not of {self.model}"
            )
        lines.append(f"  scores of each image: {self.output}/{names.SCORES}")
        return "\n".join(lines)


def score_output(store: Store) -> ScoreSummary:
    """Score every image of the output, write scores.parquet and return the summary.

    Raises:
        StorageError: there is no output, it has no image yet, or it cannot be written.
    """
    images = open_images(store)
    store.check_writable()
    table = pa.concat_tables(_score_shards(store, images.receipts))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put(names.SCORES, sink.getvalue().to_pybytes())
    return summarise_scores(store.url, images.job.model.path, table)


def summarise_scores(output: str, model: str, scores: pa.Table) -> ScoreSummary:
    """Sum up a table of SCHEMA."""
    counts = {}
    for name in judge.ATTRIBUTES:
        column = scores[f"fidelity_{name}"]
        counts[name] = (pc.sum(column).as_py() or 0, len(column) - column.null_count)
    return ScoreSummary(
        output=output,
        model=model,
        images=len(scores),
        unread=scores["fidelity"].null_count,
        fidelity=pc.mean(scores["fidelity"]).as_py(),
        attributes={name: count for name, count in counts.items() if count[1]},
    )


def read_scores(store: Store) -> dict[str, dict[str, Any]]:
    """Return the rows of scores.parquet by sha256; empty if the output was never scored.

    Raises:
        StorageError: scores.parquet is damaged, or another program wrote it.
    """
    data = store.read_if_exists(names.SCORES)
    if data is None:
        return {}
    try:
        table = pq.read_table(pa.BufferReader(data)).select(SCHEMA.names).cast(SCHEMA)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StorageError(
            f"{store.where(names.SCORES)} = {one_line(error)}: must be as `sdbatch score` wrote "
            f"it. Run `sdbatch score {store.url}` again."
        ) from error
    return {row["sha256"]: row for row in table.to_pylist()}


def _score_shards(store: Store, receipts: Sequence[Receipt]) -> Iterator[pa.Table]:
    """Yield the scores of each shard, in order; several shards are scored at the same time."""
    processes = min(len(receipts), cores())
    if processes == 1:
        yield from map(partial(_score_shard, store), receipts)
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        yield from pool.map(partial(_score_shard, store), receipts)


def _score_shard(store: Store, receipt: Receipt) -> pa.Table:
    """Return the scores of the images of one shard."""
    rows = [
        {
            "key": row["key"],
            "sha256": row["sha256"],
            **scorer.score(row["prompt"], np.asarray(open_picture(row))),
        }
        for row in shard_rows(store, receipt, ["key", "sha256", "prompt", "image"])
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
