"""What is kept for a while."""

import time

from sdbatch.serve.ttl_cache import Kept


def test_images_are_kept_for_a_while_and_up_to_some_bytes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = Kept(60, 100)
    first, second, third = (kept.put(f"{i}", 40) for i in range(3))
    assert [kept.get(name) for name in (first, second, third)] == [None, "1", "2"]
    running = kept.put("running", 0)
    fourth = kept.put("4", 90)
    assert [kept.get(name) for name in (third, running, fourth)] == [None, "running", "4"]
    now[0] = 61.0
    assert [kept.get(name) for name in (running, fourth)] == [None, None]
    large = kept.put("large", 1000)
    assert kept.get(large) == "large"  # what has just come is kept, whatever its size
