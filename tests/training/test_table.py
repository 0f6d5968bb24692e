"""The prompt table of the example job."""

from pathlib import Path

import pyarrow.parquet as pq

from training import table

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_table_equals_the_one_that_its_code_generates():
    committed_table = pq.read_table(ROOT / "jobs" / "shapes.parquet")
    assert committed_table.equals(table.prompt_table(table.ROW_COUNT, "table"))
