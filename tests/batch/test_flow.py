import pyarrow as pa

from sdbatch.batch import flow
from sdbatch.schema import Shard


def test_windows_hold_every_shard_once_with_the_url_of_its_file():
    shards = [Shard(n, "a.csv", "-", 8 * n, 0, 8) for n in range(150)]
    found = [
        row
        for window in flow.windows(shards, {"a.csv": "s3://bucket/a.csv"})
        for row in flow.one_by_one(pa.table({"window": [flow.to_bytes(window)]})).to_pylist()
    ]
    assert [row["shard"] for row in found] == list(range(150))
    assert {row["url"] for row in found} == {"s3://bucket/a.csv"}
