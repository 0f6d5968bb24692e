"""Kill a run many times, resume it each time, and compare its output with an undisturbed run's.

    python benchmarks/kills.py JOB [--kills 10] [--seed 0] [--victim driver|actor]

Checks, and exits with 1 if a check fails: `data/` is byte-identical, no file is left over, no shard
with a receipt was drawn again, and `sdbatch verify` finds no fault. Linux only (/proc).
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import click

MARK = "SDBATCH_KILLS_RUN"  # in the environment of a run's processes, to find them
ACTOR = b"DrawingActor"  # in the title of its process
SDBATCH = str(Path(sys.executable).parent / "sdbatch")


def run(job: Path, output: Path, *extra: str) -> int:
    """Run the job into `output` to its end; return the exit code."""
    return _start(job, output, *extra).wait()


def kill_and_resume(
    job: Path, output: Path, kills: int, seed: int, victim: str
) -> tuple[list[int], list[str]]:
    """Run the job with up to `kills` kill -9 at random moments, resuming it each time.

    The moments are random numbers of shards, so that they fall into all parts of the run. A driver
    that was killed is started again; after an actor's death the run must go on by itself.

    Returns:
        How many shards were committed at each kill, and which of those were drawn again.
    """
    rng = random.Random(seed)
    moments: list[int] = []
    receipts: dict[str, bytes] = {}  # at the kills
    process = _start(job, output)
    for left in range(kills, 0, -1):
        before = len(_receipts(output))
        target = before + rng.randint(0, max(1, (_planned(output) - before) // left))
        # If there is no shard to wait for, the moment may fall into the start, too.
        pause = rng.uniform(0, 12) if target == before else rng.uniform(0, 0.5)
        while process.poll() is None and len(_receipts(output)) < target:
            time.sleep(0.02)
        time.sleep(pause)
        if process.poll() is not None:
            break  # it ended before the kill
        receipts |= _receipts(output)
        moments.append(len(receipts))
        if victim == "driver":
            process.kill()
            process.wait()
            process = _start(job, output)
        else:
            _kill_actor(process)
    if (code := process.wait()) != 0:
        raise SystemExit(f"the last run ended with exit code {code}")
    now = _receipts(output)
    again = [f"{name} was drawn again" for name, text in receipts.items() if now[name] != text]
    return moments, again


def compare(alone: Path, killed: Path) -> list[str]:
    """Return the differences of `killed` from the undisturbed output."""
    faults = []
    for folder in ("data", "failed"):
        one, two = _hashes(alone / folder), _hashes(killed / folder)
        faults += [f"{folder}/{name} differs" for name in one if two.get(name) != one[name]]
        faults += [f"{folder}/{name} is left over" for name in two if name not in one]
    unexpected = sorted(_names(killed) ^ _names(alone))
    return faults + [f"{name} is left over or missing" for name in unexpected]


def _start(job: Path, output: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = [SDBATCH, "run", str(job), "--set", f"output.path={output}", "--json", *extra]
    marked = {**os.environ, MARK: uuid.uuid4().hex}
    process = subprocess.Popen(command, env=marked, stdout=subprocess.DEVNULL)
    process.mark = marked[MARK]  # type: ignore[attr-defined]
    return process


def _kill_actor(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes()
                ours = process.mark.encode() in (entry / "environ").read_bytes()  # type: ignore[attr-defined]
            except OSError:
                continue
            if ours and ACTOR in command and command.startswith(b"ray::"):
                os.kill(int(entry.name), signal.SIGKILL)
                return
        time.sleep(0.1)


def _receipts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "receipts").glob("*.json")}


def _planned(output: Path) -> int:
    import pyarrow.parquet as pq

    plan = output / "plan.parquet"
    return pq.read_metadata(plan).num_rows if plan.exists() else 1


def _names(output: Path) -> set[str]:
    """Return the names of an output's files, without runs/: each start adds a file there."""
    files = (path.relative_to(output) for path in output.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != "runs"}


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*")
        if path.is_file()
    }


@click.command()
@click.argument("job", type=click.Path(exists=True, path_type=Path))
@click.option("--kills", default=10)
@click.option("--seed", default=0)
@click.option("--victim", type=click.Choice(["driver", "actor"]), default="driver")
def main(job: Path, kills: int, seed: int, victim: str) -> None:
    """Run JOB undisturbed and killed, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        if run(job, alone):
            raise SystemExit("the undisturbed run did not end with exit code 0")
        moments, faults = kill_and_resume(job, killed, kills, seed, victim)
        faults += compare(alone, killed)
        if subprocess.run([SDBATCH, "verify", str(killed)], stdout=subprocess.DEVNULL).returncode:
            faults.append("sdbatch verify found faults")
        shards = _planned(alone)
    print(f"{len(moments)} kills of the {victim}, seed {seed}; of {shards} shards had receipts:")
    print(moments)
    print("\n".join(faults) or "byte-identical, nothing left over, nothing committed drawn again")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
