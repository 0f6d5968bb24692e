"""A shard's table as a block, and the wrapper that holds a stage to its contract."""

from dataclasses import asdict

import pyarrow as pa
import pytest

from sdbatch.batch import blocks
from sdbatch.batch.blocks import BlockStage, pack, unpack
from sdbatch.batch.metrics import Metrics
from sdbatch.schema import IMAGE
from sdbatch.stages.base import Needs, Stage, facts_of, replace_columns, shard_of, with_shard
from tests.finished import planned

ROWS = with_shard(
    pa.table({"key": ["a", "b", "c"], "image": [b"x" * 1000, None, b""]}), planned(7, 3)
)


class Double(Stage):
    """Adds a column; may lose rows, or forget the column."""

    name = "double"
    adds = pa.schema([("size", pa.int64())])

    def __init__(self, rows=3, added=True, facts=None):
        self._rows, self._added, self._facts = rows, added, facts

    def __call__(self, rows):
        rows = rows.slice(0, self._rows)
        if self._added:
            rows = rows.append_column("size", pa.array([2] * self._rows, pa.int64()))
        return with_shard(rows, planned(99), self._facts) if self._facts else rows


def test_a_block_is_one_row_and_gives_its_table_back():
    block = pack(ROWS)
    assert block.num_rows == 1
    assert unpack(block).equals(ROWS)
    assert shard_of(unpack(block)) == planned(7, 3)


def test_unpacking_copies_no_image():
    block = pack(ROWS)
    stream = block["rows"].chunk(0).buffers()[2]
    image = unpack(block)["image"].chunk(0).buffers()[2]
    assert stream.address <= image.address < stream.address + stream.size


def test_a_block_cut_out_of_a_larger_one_is_unpacked_alike():
    other = with_shard(pa.table({"key": ["d"], "image": [b"y" * 77]}), planned(8))
    both = pa.concat_tables([pack(ROWS), pack(other)]).combine_chunks()
    assert unpack(both.slice(1, 1)).equals(other)
    assert unpack(both.slice(0, 1)).equals(ROWS)


IMAGES = [
    {"bytes": b"first", "path": "a.jpg"},
    None,
    {"bytes": None, "path": "c.jpg"},
    {"bytes": b"", "path": None},
    {"bytes": b"last", "path": "e.jpg"},
]


def with_images(images):
    """Return a shard with a chunk for each image, as drawing leaves it."""
    table = pa.table({"key": [str(i) for i in range(len(images))]})
    column = pa.chunked_array([pa.array([each], IMAGE.type) for each in images], IMAGE.type)
    return with_shard(table.append_column(IMAGE, column), planned(7, len(images)), {"host": "a"})


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:1], [None], [None, None], []])
def test_a_block_gives_images_back_as_they_were_in_one_chunk(images):
    rows = with_images(images)
    unpacked = unpack(pack(rows))
    unpacked.validate(full=True)
    assert unpacked.equals(rows, check_metadata=True)
    assert unpacked["image"].num_chunks <= 1
    again = unpack(pa.concat_tables([pack(rows), pack(unpacked)]).combine_chunks().slice(1))
    assert again.equals(rows, check_metadata=True)


def test_a_block_of_more_images_than_a_chunk_may_hold_has_several(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_CHUNK", 6)  # bytes
    rows = with_images([*IMAGES, *IMAGES])
    unpacked = unpack(pack(rows))
    unpacked.validate(full=True)
    assert unpacked.equals(rows, check_metadata=True)
    assert unpacked["image"].num_chunks == 4


def test_images_are_not_copied_when_a_shard_is_unpacked():
    block = pack(with_images(IMAGES))
    files = block["files"].chunk(0).buffers()[2]
    assert files.to_pybytes() == b"firstlast"
    data = unpack(block)["image"].chunk(0).field("bytes").buffers()[2]
    assert data.address == files.address


def test_a_block_of_the_plan_is_its_own_table():
    row = pa.Table.from_pylist([{**asdict(planned(3)), "url": "a.txt"}])
    assert unpack(row) is row
    assert shard_of(row) == planned(3)


def test_a_block_of_several_shards_is_a_bug():
    with pytest.raises(RuntimeError, match="a block holds exactly one shard"):
        unpack(pa.concat_tables([pack(ROWS), pack(ROWS)]))


def test_a_stage_keeps_the_shards_number_and_all_facts():
    block = pack(with_shard(ROWS, planned(7, 3), {"host": "a", "lanes": 2}))
    rows = unpack(BlockStage(Double(facts={"lanes": 4}), Metrics())(block))
    assert (shard_of(rows).shard, facts_of(rows)) == (7, {"host": "a", "lanes": 4})
    assert rows["size"].to_pylist() == [2, 2, 2]


def test_a_stage_that_loses_rows_is_a_bug():
    with pytest.raises(RuntimeError, match="stage double: 2 rows of 3: a stage keeps all rows"):
        BlockStage(Double(rows=2), Metrics())(pack(ROWS))


def test_a_stage_that_does_not_add_its_columns_is_a_bug():
    with pytest.raises(RuntimeError, match=r"stage double: did not add .*size: int64"):
        BlockStage(Double(added=False), Metrics())(pack(ROWS))


def test_a_stage_that_adds_a_column_of_another_type_is_a_bug():
    stage = Double()
    stage.adds = pa.schema([("size", pa.string())])
    with pytest.raises(RuntimeError, match=r"stage double: did not add .*size: string"):
        BlockStage(stage, Metrics())(pack(ROWS))


def test_a_stage_that_needs_a_column_which_is_missing_is_a_bug():
    stage = Double()
    stage.needs = Needs(columns=("key", "sha256"))
    with pytest.raises(RuntimeError, match="stage double: needs the column sha256"):
        BlockStage(stage, Metrics())(pack(ROWS))


def test_rows_that_a_stage_drops_are_counted():
    class Counting(Metrics):
        def images(self, *, drawn=0, failed=0, dropped=0):
            counts.append((drawn, failed, dropped))

    class Drop(Stage):
        name = "drop"

        def __call__(self, rows):
            return replace_columns(rows, {"error": pa.array(["bad", "old", "bad"])})

    counts = []
    rows = ROWS.append_column("error", pa.array([None, "old", None]))
    BlockStage(Drop(), Counting())(pack(rows))
    assert counts == [(0, 0, 2)]
