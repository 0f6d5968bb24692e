"""What `sdbatch tune` has found, kept and found again."""

from dataclasses import replace

import pytest

from sdbatch import tuned
from sdbatch.errors import StorageError
from sdbatch.tuned import Choice, Entry, Key

CHOICE = Choice(
    lanes=16,
    dtype="float32",
    channels_last=False,
    compile=True,
    attention="math",
    decode_group=2,
    rewrites=[],
    split_k=False,
)
KEY = Key("NVIDIA H100 80GB HBM3", "580.1", {"torch": "2.13"}, "abc", 512, 768, "float16")
ENTRY = Entry(KEY, CHOICE, "2026-11-29", [{"variant": "2 lanes", "ms": 1.0}])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tune"


def test_a_choice_is_found_again_by_its_key():
    file = tuned.keep(ENTRY)
    assert file.is_file()
    assert tuned.read() == ([ENTRY], [])
    assert tuned.find([ENTRY], KEY) == ENTRY


@pytest.mark.parametrize(
    "other",
    [
        {"device": "NVIDIA H200"},
        {"driver": "590"},
        {"versions": {"torch": "2.14"}},
        {"model": "abd"},
        {"height": 768},
        {"width": 512},
        {"dtype": "float32"},
    ],
)
def test_a_choice_for_another_key_is_not_found(other):
    assert tuned.find([ENTRY], replace(KEY, **other)) is None
    tuned.keep(ENTRY)
    tuned.keep(replace(ENTRY, key=replace(KEY, **other)))
    assert len(tuned.read()[0]) == 2


def test_a_choice_is_found_by_the_type_of_another_machines_gpu():
    known = replace(KEY, device="H100", driver="")
    assert tuned.find([ENTRY], known) is None
    assert tuned.find([ENTRY], known, is_here=False) == ENTRY
    assert tuned.find([ENTRY], replace(known, device="A100"), is_here=False) is None
    assert tuned.find([ENTRY], replace(known, height=8), is_here=False) is None


def test_a_model_is_tuned_again_in_place_of_what_was_found_before():
    tuned.keep(ENTRY)
    again = replace(ENTRY, choice=replace(CHOICE, lanes=32), date="2026-12-01")
    tuned.keep(again)
    assert tuned.read() == ([again], [])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"key": 1}', b"[]"])
def test_a_damaged_file_is_ignored_with_a_note(folder, content):
    tuned.keep(ENTRY)
    (folder / "other.json").write_bytes(content)
    entries, (note,) = tuned.read()
    assert entries == [ENTRY]
    assert note.startswith(f"{folder / 'other.json'} is damaged and was ignored (")
    assert note.endswith("Remove it, or tune again.")
    assert "\n" not in note


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "file"))
    assert tuned.read() == ([], [])
    words = r"file/tune = .*: must be a folder that can be written. Set SDBATCH_CACHE to another"
    with pytest.raises(StorageError, match=words):
        tuned.check_writable()
    with pytest.raises(StorageError, match=words):
        tuned.keep(ENTRY)


def test_checking_the_cache_leaves_nothing_in_it(folder):
    tuned.check_writable()
    assert list(folder.iterdir()) == []


def test_the_versions_are_read_without_torch():
    found = tuned.versions()
    assert {"sdbatch", "torch", "diffusers"} <= set(found)


def test_a_model_is_identified_by_its_files_or_by_its_commit():
    assert tuned.model_id("models/sd15", None, "abc") == "abc"
    assert tuned.model_id("owner/name", "1234", None) == "owner/name@1234"
    assert tuned.model_id("owner/name", "1234", "abc") == "owner/name@1234+abc"
