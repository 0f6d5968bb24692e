"""`sdbatch run` on a Ray of its own that dies, or that is interrupted, by signals."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sdbatch.batch import sessions
from sdbatch.output.verify import verify_output
from sdbatch.report.status import read_status
from sdbatch.storage import Store
from tests.ray.processes import marked, ray_files
from tests.wait import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SDBATCH = str(Path(sys.executable).parent / "sdbatch")
HUGE = 1 << 42  # bytes of a file with a hole: hashing it takes hours


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
    with start(here, ray_folder, "--set", "sampling.num_inference_steps=20") as run:
        _, err = run.communicate(timeout=200)
    assert (run.returncode, err) == (0, "")
    assert list(verify_output(output)) == []
    folders = list((ray_folder / "ray").glob("session_[0-9]*"))
    assert all((folder / sessions.MARK).exists() for folder in folders)
    assert len(folders) == 2  # that of the run that failed has its logs


def huge_weights(path):
    """Write a .safetensors file with one tensor, whose bytes are a hole of the file."""
    header = json.dumps(
        {"unet.x.lora_A.weight": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + HUGE)


def test_ctrl_c_while_weights_are_hashed_ends_the_run_and_writes_nothing(here, ray_folder):
    weights = here / "huge.safetensors"
    huge_weights(weights)

    def hashing():
        return any(
            os.readlink(file) == str(weights)
            for _, _, entry in processes(ray_folder)
            for file in (entry / "fd").iterdir()
        )

    with start(here, ray_folder, "--set", f"model.loras=[{{path: {weights}}}]") as run:
        wait_until(lambda: find(ray_folder, "raylet") and hashing(), 120)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert err.startswith("Error: interrupted. ")
    assert len(err.splitlines()) == 1
    assert "Stopped: 0 images of 40" in out
    assert not (here / "out").exists()
