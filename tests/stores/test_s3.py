"""The settings of S3 and of servers that speak its language: s3fs reads them, sdbatch has none."""

import json
import os
import subprocess
import sys

import boto3
import pytest

from sdbatch.job import Prompts
from sdbatch.output import lifecycle
from sdbatch.storage import Store
from tests.stores.answers import answering

PUT = "from sdbatch.storage import Store; Store('s3://datasets/x').put('a', b'1')"
READ = "from sdbatch.storage import Store; print(Store('s3://datasets/x').read('a'))"


@pytest.fixture
def run(tmp_path):
    """Run a script in a new process whose home is tmp_path, without settings for AWS but these."""

    def run(script: str, **settings: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        unset = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**kept, **unset, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def endpoint(bucket):
    return os.environ["AWS_ENDPOINT_URL"]


def aws_config(write, *lines: str) -> None:
    write(".aws/config", "\n".join(["[default]", "region = us-east-1", *lines]))
    write(".aws/credentials", "[default]\naws_access_key_id = a\naws_secret_access_key = b\n")


def test_the_endpoint_may_be_in_the_aws_config_file(run, endpoint, write):
    aws_config(write, f"endpoint_url = {endpoint}")
    run(PUT)
    assert run(READ) == "b'1'"


def test_a_profile_may_name_the_endpoint(run, endpoint, write):
    keys = "aws_access_key_id = a\naws_secret_access_key = b\n"
    write(".aws/config", f"[profile minio]\nregion = x\nendpoint_url = {endpoint}\n{keys}")
    run(PUT, AWS_PROFILE="minio")
    assert run(READ, AWS_PROFILE="minio") == "b'1'"


def test_the_endpoint_and_the_keys_may_be_in_fsspecs_config_file(run, endpoint, write):
    settings = {"endpoint_url": endpoint, "key": "a", "secret": "b"}
    write(".config/fsspec/conf.json", json.dumps({"s3": settings}))
    run(PUT)
    assert run(READ) == "b'1'"


def test_the_bucket_is_in_the_path_if_the_aws_config_file_says_so(run, write):
    with answering((200, "")) as (address, requests):
        port = address.partition(":")[2]
        style = ["s3 =", "  addressing_style = path"]
        aws_config(write, f"endpoint_url = http://localhost:{port}", *style)
        run(PUT)
    assert requests == [f"localhost:{port} PUT /datasets/x/a"]


@pytest.mark.parametrize("how", ["FSSPEC_S3_ANON", "conf.json"])
def test_a_public_bucket_is_read_without_keys(run, endpoint, write, how):
    boto3.client("s3").put_object(Bucket="datasets", Key="x/a", Body=b"1", ACL="public-read")
    settings = {"AWS_ENDPOINT_URL": endpoint}
    if how == "conf.json":
        write(".config/fsspec/conf.json", json.dumps({"s3": {"anon": True}}))
    else:
        settings[how] = "true"
    assert run(READ, **settings) == "b'1'"


def test_output_may_be_next_to_a_table_in_a_folder_with_brackets(bucket):
    boto3.client("s3").put_object(Bucket=bucket, Key="[1]/a.csv", Body=b"prompt\ndog\n")
    prompts = Prompts(path=f"s3://{bucket}/[1]/a.csv")
    lifecycle.check_output(Store(f"s3://{bucket}/out"), prompts)
