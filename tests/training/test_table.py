"""The prompt table: it depends only on its seed, and that of the example job is committed."""

from pathlib import Path

import pyarrow.parquet as pq

from sdbatch.shapes import parse
from training import table

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_table_equals_the_one_that_its_code_generates():
    committed_table = pq.read_table(ROOT / "jobs" / "shapes.parquet")
    assert committed_table.equals(table.prompt_table(table.ROW_COUNT, "table"))


def test_the_prompt_table_depends_only_on_its_seed_and_its_labels_match_its_prompts():
    prompts = table.prompt_table(100, "table")
    assert prompts == table.prompt_table(100, "table")
    assert prompts != table.prompt_table(100, "other")
    assert prompts.column_names[:2] == ["id", "prompt"]
    assert len(set(prompts["id"].to_pylist())) == 100
    for row in prompts.to_pylist():
        scene = parse.parse_prompt(row["prompt"])
        first = scene.groups[0]
        assert (first.shape, first.colour, first.count) == (
            row["shape"],
            row["colour"],
            row["count"],
        )
        assert len(scene.groups) == row["groups"]
        assert scene.background in (row["background"], None)
