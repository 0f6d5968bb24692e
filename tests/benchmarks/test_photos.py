"""benchmarks/photos.py: that every way to name photos is read and drawn."""

import pytest


@pytest.mark.parametrize("way", ["files", "parquet", "tar", "part"])
def test_the_photos_of_each_way_are_read_and_drawn(script, tmp_path, monkeypatch, way):
    photos = script("photos")
    monkeypatch.setattr(photos, "WIDTH", 4000 // 10)
    monkeypatch.setattr(photos, "HEIGHT", 3000 // 10)
    photos.write_tables(tmp_path, 5)
    for step in ("read", "draw"):
        found = photos.measure(step, way, tmp_path, side=64)
        assert found["shards"] * found["images_per_shard"] >= 5
        assert found["ms_a_photo"] > 0
        assert found["peak_mib"] >= found["first_half_mib"]
