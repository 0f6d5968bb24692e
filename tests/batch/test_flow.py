import pyarrow as pa
import pytest

from sdbatch.batch import flow
from sdbatch.schema import Shard
from tests.finished import read_stage


class Pass:
    """A read stage that returns what it gets."""

    def __call__(self, block):
        assert block.num_rows == 1
        return block


@pytest.mark.parametrize(
    ("shards", "readers", "sizes"),
    [(150, 1, [64, 64, 22]), (150, 2, [64, 64, 22]), (50, 2, [25, 25]), (3, 50, [1, 1, 1])],
)
def test_windows_hold_every_shard_once_with_the_url_of_its_file(shards, readers, sizes):
    planned = [Shard(n, "a.csv", "-", 8 * n, 0, 8) for n in range(shards)]
    windows = list(flow.windows(planned, {"a.csv": "s3://bucket/a.csv"}, readers))
    assert [window.num_rows for window in windows] == sizes
    read = flow.ReadWindow(Pass())
    found = [
        row
        for window in windows
        for block in read(pa.table({"window": [flow.to_bytes(window)]}))
        for row in block.to_pylist()
    ]
    assert [row["shard"] for row in found] == list(range(shards))
    assert {row["url"] for row in found} == {"s3://bucket/a.csv"}


@pytest.mark.parametrize(("header", "readers"), [("prompt", 2), ("prompt,image", 8)])
def test_each_actor_has_a_reader_where_rows_have_pictures(make_job, write, header, readers):
    cells = "a dog,x" if "image" in header else "a dog"
    path = write("t.csv", f"{header}\n{cells}\n")
    _, read, _ = read_stage(make_job(prompts={"path": path}))
    assert flow.count_readers(read, actors=8) == readers
