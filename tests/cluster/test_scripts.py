"""The scripts of cluster/, and what every file there begins with."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.cluster import FILES, read_by_ray, top

SHELL = sorted(FILES.glob("*.sh"))
PLACES = sorted([*FILES.glob("*.yaml"), *SHELL])

every_place = pytest.mark.parametrize("path", PLACES, ids=lambda path: path.name)
every_script = pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)


@every_place
def test_a_file_begins_with_how_to_bring_it_up_submit_look_and_take_it_down(path):
    told = re.findall(r"^   (\w+) +\S", top(path), re.M)
    assert [word for word in told if word in ("up", "submit", "look", "down")] == [
        "up",
        "submit",
        "look",
        "down",
    ]


def test_the_readme_names_every_file_once_and_repeats_no_command():
    text = (FILES / "README.md").read_text()
    for path in [*PLACES, FILES / "spot.py"]:
        assert text.count(f"({path.name})") == 1
        assert not any(line in text for line in map(str.strip, top(path).splitlines()) if line)


@every_script
def test_bash_can_read_a_script(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@every_script
def test_shellcheck_finds_nothing_in_a_script(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Return a function that puts a command on the PATH, in bash; calls.txt is what they write."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def stub(name: str, body: str = "") -> None:
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        path.chmod(0o755)

    return stub


def calls(tmp_path) -> list[str]:
    return (tmp_path / "calls.txt").read_text().splitlines()


@pytest.fixture
def slurm(stubs, monkeypatch):
    """Stand in for Slurm with two nodes, and for Ray; sdbatch itself is each test's."""
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    stubs("scontrol", 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi')
    stubs("hostname", "echo 10.0.0.1 10.0.0.2")
    stubs("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stubs("ray", "exec sleep 60")
    stubs("python", 'until [ "$(grep -c "^ray start" "$CALLS")" = 2 ]; do sleep 0.1; done')
    return stubs


def run_slurm(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(FILES / "slurm.sh"), *arguments])


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_slurm_job_ends_with_the_runs_exit_code_and_leaves_nothing(slurm, tmp_path, code):
    slurm(
        "sdbatch",
        f'echo "$RAY_ADDRESS $RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}}" >> "$CALLS"; exit {code}',
    )
    assert run_slurm("job.yaml", "--set", "output.path=a b").wait(30) == code
    told = calls(tmp_path)
    assert "sdbatch run job.yaml --set output.path=a b" in told
    assert "10.0.0.1:20690 token 64" in told  # 20000 + 12345 % 6000 * 2
    starts = [line for line in told if line.startswith("ray start")]
    assert len(starts) == 2
    assert all("--num-cpus=3" in line and "--block" in line for line in starts)
    for line in starts:
        read_by_ray(line)
    assert sum("--head --node-ip-address=10.0.0.1 --port=20690" in line for line in starts) == 1
    assert sum("--address=10.0.0.1:20690" in line for line in starts) == 1
    assert told[-1].endswith("rm -rf /tmp/ray-12345")
    assert not any("requeue" in line for line in told)


def test_the_slurm_job_goes_back_into_the_queue_when_its_time_is_nearly_over(slurm, tmp_path):
    slurm("sdbatch", 'echo drawing >> "$CALLS"; exec sleep 60')
    job = run_slurm("job.yaml")
    while not (tmp_path / "calls.txt").exists() or "drawing" not in calls(tmp_path):
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) != 0
    assert calls(tmp_path)[-1] == "scontrol requeue 12345"


def test_the_slurm_job_says_so_when_ray_does_not_come_up(slurm, tmp_path):
    slurm("python", "exit 1")
    slurm("sdbatch")
    assert run_slurm("job.yaml").wait(30) == 2
    assert not any(line.startswith("sdbatch") for line in calls(tmp_path))


def test_bare_machines_get_the_token_by_stdin_and_workers_the_heads_address(stubs, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef")
    stubs("ssh", 'cat >> "$CALLS"; echo >> "$CALLS"')
    bare = ["bash", str(FILES / "bare.sh")]
    subprocess.run([*bare, "up", "me@head", "me@w1"], check=True)
    told = [line for line in calls(tmp_path) if line]
    assert [line for line in told if line == "0123456789abcdef"] == ["0123456789abcdef"] * 2
    commands = [line.replace("\\", "") for line in told if line.startswith("ssh")]
    hosts = [re.search(r"me@\w+", line)[0] for line in commands]
    assert hosts == ["me@head", "me@head", "me@w1", "me@w1"]
    assert "|| ray start --disable-usage-stats --head --port=6379" in commands[1]
    assert "; ray start --disable-usage-stats --address=head:6379" in commands[3]
    subprocess.run([*bare, "drain", "me@w1"], check=True)
    drained = next(line for line in calls(tmp_path) if "drain-node" in line).replace("\\", "")
    for line in (commands[1].partition("||")[2], commands[3].partition(";")[2], drained):
        read_by_ray(line[line.index("ray ") :])
    assert all("export RAY_AUTH_MODE=token" in line for line in commands)
    assert not any("0123456789abcdef" in line for line in commands)


def test_bare_says_how_it_is_used():
    bare = ["bash", str(FILES / "bare.sh")]
    for arguments in ([], ["up"], ["drian", "w1"]):
        done = subprocess.run([*bare, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "up" in done.stderr


def metadata(answers: dict[tuple[str, str], list[str | None]]) -> HTTPServer:
    """Serve the answers, one after the other and the last for ever; None is 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left = answers[self.command, self.path]
            text = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


NOTICE = '{"action": "terminate", "time": "2026-11-24T08:22:00Z"}'
AWS = {
    ("PUT", "/latest/api/token"): ["t"],
    ("GET", "/latest/meta-data/spot/instance-action"): [None, NOTICE],
}
GCP = {("GET", "/computeMetadata/v1/instance/preempted"): ["FALSE", "TRUE"]}


@pytest.mark.parametrize(("cloud", "answers", "seconds"), [("aws", AWS, 120), ("gcp", GCP, 30)])
def test_a_spot_machine_drains_its_node_when_its_cloud_says_that_it_goes(
    stubs, tmp_path, cloud, answers, seconds
):
    stubs("ray", 'printf "%q " ray "$@" > "$CALLS"')
    server = metadata({key: list(values) for key, values in answers.items()})
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        subprocess.run(
            [sys.executable, str(FILES / "spot.py"), cloud, base], check=True, timeout=60
        )
    finally:
        server.shutdown()
        server.server_close()
    (told,) = calls(tmp_path)
    read_by_ray(told)
    assert told.startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert f"--deadline-remaining-seconds {seconds}" in told
