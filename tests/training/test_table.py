"""The main job's prompt table: made by committed code, from a seed."""

from pathlib import Path

import pyarrow.parquet as pq

from training import table

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_table_is_the_one_that_its_code_makes():
    assert pq.read_table(ROOT / "jobs" / "shapes.parquet").equals(table.rows(table.ROWS, "table"))
