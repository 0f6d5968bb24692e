"""The sha256 of files, cached for as long as they are the same."""

import hashlib
import os

import pytest

from sdbatch.models import file_hash
from sdbatch.models.file_hash import file_sha256


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def sha256(text):
    return hashlib.sha256(text).hexdigest()


def test_a_file_is_read_once(weights, monkeypatch):
    assert file_sha256(weights) == sha256(b"weights")
    monkeypatch.setattr(file_hash.hashlib, "file_digest", None)
    assert file_sha256(weights) == sha256(b"weights")


@pytest.mark.parametrize("change", ["size", "time", "inode", "path"])
def test_a_file_that_has_changed_is_read_again(weights, tmp_path, change):
    assert file_sha256(weights) == sha256(b"weights")
    before = weights.stat()
    if change == "size":
        weights.write_bytes(b"weights and more")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        weights.write_bytes(b"WEIGHTS")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "inode":
        other = tmp_path / "other"
        other.write_bytes(b"WEIGHTS")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(weights)
    else:
        weights = weights.rename(tmp_path / "moved")
    assert file_sha256(weights) == sha256(weights.read_bytes())


def test_a_cache_that_cannot_be_used_is_no_error(weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "file"))
    assert file_sha256(weights) == sha256(b"weights")


def test_a_damaged_entry_of_the_cache_is_read_again(weights, tmp_path):
    file_sha256(weights)
    (entry,) = (tmp_path / "cache" / "sha256").iterdir()
    entry.write_text("")
    assert file_sha256(weights) == sha256(b"weights")
