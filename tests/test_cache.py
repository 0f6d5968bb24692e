"""The folder of what a machine keeps between commands."""

import pytest

from sdbatch import cache


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder("tune") == tmp_path / "own" / "tune"
    monkeypatch.delenv("SDBATCH_CACHE")
    assert cache.folder("tune") == tmp_path / "xdg" / "sdbatch" / "tune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder("tune") == tmp_path / ".cache" / "sdbatch" / "tune"


def test_an_entry_is_written_whole_or_not_at_all(tmp_path):
    entry = tmp_path / "new" / "entry"
    cache.write(entry, "one")
    with pytest.raises(UnicodeEncodeError):
        cache.write(entry, "two \ud800")
    assert [file.read_text() for file in entry.parent.iterdir()] == ["one"]
