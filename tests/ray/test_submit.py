"""Jobs handed to a cluster of three nodes, whose head draws nothing; their output is on S3.

The cluster wants a token. Between it and `sdbatch submit` stands a proxy that cuts every connection
after a moment, as load balancers do.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest

from sdbatch.report.status import read_status
from sdbatch.storage import Store
from tests.s3.conftest import bucket  # noqa: F401  a fixture

BIN = Path(sys.executable).parent
TOKEN = "a-token-of-64-digits-or-what-else-the-head-was-started-with"
CUT_SECONDS = 2.0
JOB = """\
prompts: {path: tables/p.csv}
model: builtin:shapes
sampling: {height: 64, width: 64, num_inference_steps: 2}
cluster: {actors: 2, cpus_per_actor: 1}
output: {path: s3://datasets/submitted, images_per_shard: 2}
"""


@pytest.fixture(scope="module")
def dashboard():
    """Start the cluster; yield where its dashboard is."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes = subprocess.Popen(
        [str(BIN / "python"), "-m", "tests.nodes", "0", "2", "2"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    yield json.loads(nodes.stdout.readline())["dashboard"]
    nodes.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        nodes.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(nodes.pid, signal.SIGKILL)
    nodes.wait()
    nodes.stdout.close()


@pytest.fixture(scope="module")
def proxy(dashboard):
    """Yield an address that leads to the dashboard, for CUT_SECONDS a connection."""
    to = urlsplit(dashboard)
    listener = socket.create_server(("127.0.0.1", 0))
    cut = []

    def carry(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client):
        with client, socket.create_connection((to.hostname, to.port)) as server:
            ways = [
                threading.Thread(target=carry, args=way, daemon=True)
                for way in ((client, server), (server, client))
            ]
            for way in ways:
                way.start()
            ways[1].join(CUT_SECONDS)
            if ways[1].is_alive():
                cut.append(client)
                for end in (client, server):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
            for way in ways:
                way.join()

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", cut
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join()


@pytest.fixture
def folder(tmp_path):
    """A folder with a job, its table and a token file, as a user has them."""
    (tmp_path / "tables").mkdir()
    lines = [f"a red circle,{height}" for height in (63, *[64] * 10)]  # the first cannot be drawn
    (tmp_path / "tables" / "p.csv").write_text("\n".join(["prompt,height", *lines]))
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "token").write_text(TOKEN)
    return tmp_path


def environment(folder):
    found = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return {**found, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}


def pass_on():
    names = "AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_DEFAULT_REGION"
    return [part for name in names.split() for part in ("--env", name)]


def submit(folder, address, *options, **more):
    command = [str(BIN / "sdbatch"), "submit", "job.yaml", "--address", address, *options]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(folder), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def data(prefix):
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket="datasets", Prefix=f"{prefix}/data/")["Contents"]
    return {
        entry["Key"].rpartition("/")[2]: client.get_object(Bucket="datasets", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in listed
    }


def test_a_job_drawn_on_a_cluster_has_the_bytes_of_one_drawn_here(bucket, dashboard, proxy, folder):  # noqa: F811
    address, cut = proxy
    over_there = submit(folder, address, *pass_on())
    text, _ = over_there.communicate()
    assert over_there.returncode == 3, text
    assert "Finished: 10 images of 11, 1 failed." in text
    assert text.count("Running entrypoint for job") == 1, text  # a log that broke off goes on
    assert cut  # it did break off

    ray = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", "."]
    variables = {name: os.environ[name] for name in pass_on() if name.startswith("AWS_")}
    ray += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    run = ["sdbatch", "run", "job.yaml", "--set", "output.path=s3://datasets/by-ray"]
    auth = {**environment(folder), "RAY_AUTH_MODE": "token"}
    done = subprocess.run([*ray, "--", *run], cwd=folder, env=auth, capture_output=True, text=True)
    assert "Finished: 10 images of 11, 1 failed." in done.stdout, done.stdout + done.stderr

    here = [str(BIN / "sdbatch"), "run", "job.yaml", "--set", "output.path=here"]
    assert subprocess.run(here, cwd=folder, capture_output=True).returncode == 3
    local = {path.name: path.read_bytes() for path in (folder / "here" / "data").iterdir()}
    assert len(local) == 6
    assert local == data("submitted") == data("by-ray")


def test_a_job_is_left_found_again_and_ended(bucket, dashboard, folder):  # noqa: F811
    path = "s3://datasets/left"
    slow = ["--set", f"output.path={path}", "--set", "prompts.images_per_row=2000", *pass_on()]
    slow += ["--driver-cpus", "0.5"]  # which the head does not have
    first = submit(folder, dashboard, *slow)
    for line in first.stdout:
        if "loading the model" in line:
            break
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate()
    assert first.returncode == 130
    assert "keeps running on the cluster. Run the same command again to follow it" in text
    assert "Traceback" not in text

    other = submit(folder, dashboard, *slow, "--max-failed", "1")
    text, _ = other.communicate()
    assert other.returncode == 2
    assert "draws it already, from another job file or with other options" in text

    again = submit(folder, dashboard, *slow)
    assert "which draws this output already" in again.stdout.readline()
    while read_status(Store(path)).shards_committed == 0:
        time.sleep(1)
    ended = submit(folder, dashboard, *slow, "--stop")
    assert "Submit it again to go on" in ended.communicate()[0]
    text, _ = again.communicate()
    assert again.returncode == 1
    assert "Error: the job ended without an exit code, STOPPED" in text
    found = read_status(Store(path))
    assert (found.state, found.shards_committed > 0) == ("stopped", True)

    nothing = submit(folder, dashboard, *slow, "--stop")
    assert "no job of this cluster draws it" in nothing.communicate()[0]
    assert nothing.returncode == 2


def test_a_wrong_token_is_an_error(dashboard, folder):
    (folder / "token").write_text("another")
    refused = submit(folder, dashboard, *pass_on(), AWS_ENDPOINT_URL="-", AWS_ACCESS_KEY_ID="-",
                     AWS_SECRET_ACCESS_KEY="-", AWS_DEFAULT_REGION="-")  # fmt: skip
    text, _ = refused.communicate()
    assert refused.returncode == 2
    assert "the cluster requires its token in RAY_AUTH_TOKEN or in ~/.ray/auth_token" in text
