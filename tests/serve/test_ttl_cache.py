"""Values that are stored for a limited time."""

import time

from sdbatch.serve.ttl_cache import TTLCache


def test_images_are_stored_for_a_limited_time_and_up_to_some_bytes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cache = TTLCache(60, 100)
    first, second, third = (cache.put(f"{i}", 40) for i in range(3))
    assert [cache.get(name) for name in (first, second, third)] == [None, "1", "2"]
    running = cache.put("running", 0)
    fourth = cache.put("4", 90)
    assert [cache.get(name) for name in (third, running, fourth)] == [None, "running", "4"]
    now[0] = 61.0
    assert [cache.get(name) for name in (running, fourth)] == [None, None]
    large = cache.put("large", 1000)
    assert cache.get(large) == "large"  # the newest is stored, whatever its size
