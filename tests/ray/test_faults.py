"""`sdbatch run` on a Ray of its own that dies, or that is interrupted, by signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdbatch import cache, resolve
from sdbatch.batch import sessions
from sdbatch.job import load
from sdbatch.models import file_hash, find_model
from sdbatch.output.verify import verify_output
from sdbatch.report.status import read_status
from sdbatch.storage import Store
from tests.ray.processes import marked, ray_files
from tests.wait import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SDBATCH = str(Path(sys.executable).parent / "sdbatch")


@pytest.fixture
def here(tmp_path):
    """A folder with a job of 20 shards."""
    (tmp_path / "p.txt").write_text("".join(f"a dog, number {i}\n" for i in range(40)))
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: p.txt}\nmodel: builtin:shapes\ncluster: {actors: 1}\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 20}\n"
        "output: {path: out, images_per_shard: 2}\n"
    )
    return tmp_path


@pytest.fixture
def ray_folder():
    with ray_files() as folder:
        yield folder


def start(here, ray_folder, *arguments):
    return subprocess.Popen(
        [SDBATCH, "run", "job.yaml", *arguments],
        cwd=here,
        env=marked(ray_folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def processes(ray_folder):
    """Yield the id, the program and the folder in /proc of each process of a run."""
    mark = f"RAY_TMPDIR={ray_folder}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                yield int(entry.name), os.readlink(entry / "exe").rpartition("/")[2], entry
        except OSError:  # it has ended, or is not ours
            continue


def find(ray_folder, program):
    found = [pid for pid, name, _ in processes(ray_folder) if name == program]
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_run_whose_ray_dies_says_so_in_one_line_and_the_same_command_goes_on(
    victim, here, ray_folder
):
    receipts = here / "out" / "receipts"
    with start(here, ray_folder) as run:
        wait_until(lambda: receipts.exists() and any(receipts.iterdir()), 120)
        os.kill(find(ray_folder, victim), signal.SIGKILL)
        _, err = run.communicate(timeout=200)
    assert run.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("Error: ")
    assert "Ray" in line
    log = Path(line.partition("log: ")[2].partition(" ")[0].rstrip("."))
    assert "The logs of Ray's own processes are in " in log.read_text()
    output = Store(str(here / "out"))
    status = read_status(output)
    assert status.state == "stopped"
    assert 0 < status.images < 40
    with start(here, ray_folder) as run:
        _, err = run.communicate(timeout=200)
    assert (run.returncode, err) == (0, "")
    assert list(verify_output(output)) == []
    folders = list((ray_folder / "ray").glob("session_[0-9]*"))
    assert all((folder / sessions.MARK).exists() for folder in folders)
    assert len(folders) == 2  # that of the run that failed has its logs


def test_ctrl_c_while_weights_are_hashed_ends_the_run_and_writes_nothing(
    here, ray_folder, tiny_model, monkeypatch
):
    monkeypatch.setenv("SDBATCH_CACHE", str(here / "cache"))
    job = load(str(here / "job.yaml"), [f"model={tiny_model}"])
    weights = find_model.hashed_files(resolve.find_model(job)[0])[0]
    known = cache.folder("sha256") / file_hash._identity(weights)
    known.parent.mkdir(parents=True)
    os.mkfifo(known)  # reading the hash of the first file never ends

    with start(here, ray_folder, "--set", f"model={tiny_model}") as run:
        wait_until(lambda: find(ray_folder, "raylet") and is_read(known), 120)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert err.startswith("Error: interrupted. ")
    assert len(err.splitlines()) == 1
    assert "Stopped: 0 images of 40" in out
    assert not (here / "out").exists()


def is_read(fifo):
    """Tell whether a process waits to read; it goes on waiting, as nothing is written."""
    try:
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # left open
    except OSError:
        return False
    return True
