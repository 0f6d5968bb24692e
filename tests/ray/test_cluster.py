"""A cluster of three nodes, whose head draws nothing: runs that connect to it, jobs handed to it.

The output of the jobs is on S3. The cluster wants a token. Between it and `sdbatch submit` is a
proxy that cuts every connection after a moment, as load balancers do.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest

import sdbatch
from sdbatch.report.status import read_status
from sdbatch.storage import Store
from tests import nodes
from tests.stores.conftest import bucket  # noqa: F401  a fixture
from tests.wait import wait_until
from tests.without_ray import without_ray

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
def cluster():
    """Start the cluster; yield where its `dashboard` is and its `address`."""
    path = f"{BIN}:{os.environ['PATH']}"
    with nodes.running(0, 2, 2, PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as process:
        yield json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def dashboard(cluster):
    return cluster["dashboard"]


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
        # a shell that runs the tests in the background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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


@pytest.fixture
def local_data(folder, monkeypatch):
    """The files of the folder's job, drawn in this process."""
    monkeypatch.chdir(folder)
    with without_ray():
        assert sdbatch.run(sdbatch.load_job("job.yaml", ["output.path=here"])).exit_code == 3
    files = {path.name: path.read_bytes() for path in (folder / "here" / "data").iterdir()}
    assert len(files) == 6
    return files


@pytest.mark.usefixtures("bucket")
def test_a_job_drawn_on_a_cluster_has_the_bytes_of_one_drawn_here(proxy, folder, local_data):
    address, cut = proxy
    over_there = submit(folder, address, *pass_on())
    text, _ = over_there.communicate()
    assert over_there.returncode == 3, text
    assert "Finished: 10 images of 11, 1 failed." in text
    assert text.count("Running entrypoint for job") == 1, text  # a log that broke off goes on
    assert cut  # it did break off
    assert data("submitted") == local_data


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_ray_submits_a_job_with_a_table_on_s3_that_has_the_same_bytes(
    dashboard, folder, local_data
):
    boto3.client("s3").upload_file(str(folder / "tables" / "p.csv"), "datasets", "tables/p.csv")
    ray = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", "."]
    variables = {name: os.environ[name] for name in pass_on() if name.startswith("AWS_")}
    ray += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    run = ["sdbatch", "run", "job.yaml", "--set", "output.path=s3://datasets/by-ray"]
    run += ["--set", "prompts.path=s3://datasets/tables/p.csv"]
    auth = {**environment(folder), "RAY_AUTH_MODE": "token"}
    done = subprocess.run([*ray, "--", *run], cwd=folder, env=auth, capture_output=True, text=True)
    assert "Finished: 10 images of 11, 1 failed." in done.stdout, done.stdout + done.stderr
    assert data("by-ray") == local_data


@pytest.mark.usefixtures("bucket")
def test_a_job_is_left_found_again_and_ended(dashboard, folder):
    path = "s3://datasets/left"
    slow = ["--set", f"output.path={path}", "--set", "prompts.images_per_row=2000", *pass_on()]
    slow += ["--driver-cpus", "0.5"]  # which the head does not have
    first = submit(folder, dashboard, *slow)
    for line in first.stdout:
        if " of 22,000 images" in line:
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
    wait_until(lambda: "job.yaml" in Store(path).names(), 120)
    wait_until(lambda: read_status(Store(path)).shards_committed, 120)
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


def answers(address):
    """Tell whether something listens at the cluster's address."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 5):
        return True


def test_run_uses_the_ray_at_an_address_and_leaves_it_running(cluster, folder):
    command = [str(BIN / "sdbatch"), "run", "job.yaml", "--address", cluster["address"], "--json"]
    local = ["--set", "output.path=out", "--set", "prompts.limit=3", "--set", "cluster.actors=1"]
    auth = {**environment(folder), "RAY_AUTH_MODE": "token"}
    done = subprocess.run([*command, *local], cwd=folder, env=auth, capture_output=True, text=True)
    assert done.returncode == 3
    column, rows = done.stderr.splitlines()
    assert column.startswith("Note: column 'height' overrules sampling.height = 64")
    assert rows.startswith("Note: 1 of the first 3 rows cannot be drawn: height = '63'")
    events = [json.loads(line) for line in done.stdout.splitlines()]  # and nothing that Ray prints
    assert {event["event"] for event in events} == {"progress", "report"}
    report = events[-1]
    assert (report["event"], report["images"], report["failed"]) == ("report", 2, 1)
    assert list(report["startup"]) == ["ray", "model", "image", "shard"]
    assert answers(cluster["address"])


def test_the_ray_at_ray_address_is_used_and_left_running(cluster, folder):
    program = (
        "from sdbatch.batch import ray_setup; from sdbatch.job import load\n"
        "with ray_setup.connected(None, load('job.yaml')) as machines:\n"
        "    print(sorted(node.cpus for node in machines.nodes))"
    )
    auth = {**environment(folder), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": cluster["address"]}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=auth, capture_output=True, text=True
    )
    assert done.stdout == "[0, 2.0, 2.0]\n", done.stderr
    assert answers(cluster["address"])
