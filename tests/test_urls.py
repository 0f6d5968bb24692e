"""What of a URL may be shown, and which URLs name a folder."""

import pickle

import pytest

from sdbatch.errors import JobError, StorageError, one_line, short_repr
from sdbatch.storage import Store, connect, storage_errors
from sdbatch.urls import names_folder, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:word@host/p.csv", "http://host/p.csv"),
        ("http://user:wo@rd@host:99/p.csv", "http://host:99/p.csv"),
        ("http://user:wo/rd@host/p.csv", "http://host/p.csv"),
        ("http://user:wo?rd@host/p.csv", "http://host/p.csv"),
        ("https://TOKEN@host/p.csv", "https://host/p.csv"),
        ("s3://KEY:SE/CR+ET@bucket/x", "s3://bucket/x"),
        ("simplecache::s3://KEY:SECRET@bucket/x", "simplecache::s3://bucket/x"),
        ("zip://a.csv::http://user:word@host/x.zip", "zip://a.csv::http://host/x.zip"),
        ("sftp://me:word@host/x", "sftp://me@host/x"),
        ("https://host/p.csv?sig=a%3D", "https://host/p.csv"),
        ("https://host/p.csv?sv=1&sig=a%3D&se=2", "https://host/p.csv?sv=1&se=2"),
        ("https://host/get?file=p.csv&token=a", "https://host/get?file=p.csv"),
        ("https://host/p?X-Amz-Credential=a/b&X-Amz-Signature=c&X-Amz-Date=d", "https://host/p"),
        ("https://host/p?x-goog-signature=c", "https://host/p"),
        ("https://host/p?AWSAccessKeyId=a&Signature=c&Expires=5", "https://host/p?Expires=5"),
        ("https://host/p?api_key=a&Policy=b&access_token=c&n=1", "https://host/p?n=1"),
        ("('http://user:word@host/x' failed)", "('http://host/x' failed)"),
        ("https://host/p.csv?sig=abc: must be", "https://host/p.csv: must be"),
        ("one http://a:b@c and https://d:e@f", "one http://c and https://f"),
    ],
)
def test_passwords_keys_and_signatures_are_removed(url, shown):
    assert without_secrets(url) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/p@x",
        "http://host:8265: must be reachable, a@b",
        "http://[::1]:80/a@b",
        "s3://bucket/a@b.csv",
        "s3://bucket/part-?.csv",
        "s3://arn:aws:s3:us-east-1:12:accesspoint/n/a@b.csv",
        "abfs://container@account.dfs.core.windows.net/p",
        "github://org:repo@main/p.csv",
        "hf://datasets/me/dogs@main/p.csv",
        "https://host/p?file=a.csv&author=b&design=c",
        "/home/me/a:b@c/p.csv",
        "why? a=b, prompt~cat",
        "",
    ],
)
def test_text_without_secrets_stays_as_it_is(text):
    assert without_secrets(text) == text


@pytest.mark.timeout(20)  # an error may quote any text
def test_removing_secrets_takes_linear_time():
    for part in ("://", "a://b:", "http://a:b@c?sig=", "?a=&", "x" * 10, "@", "?"):
        without_secrets(part * (600_000 // len(part)))


def test_errors_hold_no_secrets():
    text = "prompts.path = http://me:word@host/p.csv?sig=abc: must be there."
    assert str(JobError(text)) == "prompts.path = http://host/p.csv: must be there."
    assert "word" not in repr(pickle.loads(pickle.dumps(JobError(text))))
    assert one_line(ValueError(text), 30) == "prompts.path = http://host/p.c"
    long = "s3://KEY:SECRET" + "x" * 100 + "@bucket/x"
    assert "SECRET" not in short_repr({"path": [long]})


def test_error_of_a_filesystem_with_a_secret_in_its_text_is_not_the_cause():
    """Ray logs the cause of an error with its text."""
    error = FileNotFoundError("nothing there")
    error.__cause__ = RuntimeError("http://me:word@host/p")
    with pytest.raises(StorageError) as caught, storage_errors("http://me:word@host/p"):
        raise error
    assert str(caught.value).startswith("http://host/p = nothing there: must be there")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_store_shows_its_url_without_secrets_and_connects_with_them():
    store = pickle.loads(pickle.dumps(Store("ftp://me:word@host/dogs/")))
    assert (store.url, store.where("a")) == ("ftp://me@host/dogs", "ftp://me@host/dogs/a")
    assert store._address == "ftp://me:word@host/dogs"


@pytest.mark.parametrize("protocol", ["s3", "gs", "simplecache::s3"])
def test_access_keys_in_the_url_of_a_bucket_are_an_error_without_them(protocol):
    with pytest.raises(StorageError, match="access keys in the URL: must be in the env") as caught:
        connect(f"{protocol}://KEY:SEC/RET@bucket/x")
    assert str(caught.value).startswith(f"{protocol}://bucket/x = ")


NOWHERE = ["", " ", "/", "//", "s3://", "gs://", "s3:///x", "s3:/b", "s3:", "file://", "file:///"]


@pytest.mark.parametrize("url", [*NOWHERE, "memory://", "http:///x", "simplecache::s3://"])
def test_protocol_or_root_alone_names_no_folder(url):
    assert not names_folder(url)
    with pytest.raises(StorageError, match=r"= names no folder: must be a folder, such as"):
        Store(url)


@pytest.mark.parametrize("url", ["out", ".", "~", "s3://b", "hdfs:///x", "memory://x", "file:///x"])
def test_folder_or_bucket_is_accepted(url):
    assert names_folder(url)
