"""How long each step of a start takes: `sdbatch run` on the embedded model, cold.

    python benchmarks/startup.py [--repeats 3]

Seconds from the command to the end of each step, medians over fresh processes: the checks, Ray's
start, the model in an actor, the first image, the first shard, the end. Prints a table and JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from findings import report

JOB = """
prompts: {path: %s}
model: builtin:shapes
sampling: {num_inference_steps: 25, height: 128, width: 128}
output: {path: %s}
"""


def start_once(folder: Path) -> dict[str, float]:
    """Run a job of 64 images; return the seconds from the command to each step."""
    (folder / "p.txt").write_text(
        "".join(f"a red circle on a blue background, number {i}\n" for i in range(64))
    )
    (folder / "job.yaml").write_text(JOB % (folder / "p.txt", folder / "out"))
    command = [str(Path(sys.executable).parent / "sdbatch"), "run", str(folder / "job.yaml")]
    began = time.time()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    ended = time.time()
    report = json.loads(done.stdout.splitlines()[-1])
    checked = report["began"] - began
    steps = {name: checked + seconds for name, seconds in report["startup"].items()}
    return {
        "checks": checked,
        **steps,
        "finished": checked + report["seconds"],
        "exit": ended - began,
    }


@click.command()
@click.option("--repeats", default=3)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(repeats: int, output: Path | None) -> None:
    """Measure the start of a run."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            runs.append(start_once(Path(name)))
    medians = {step: round(statistics.median(run[step] for run in runs), 2) for step in runs[0]}
    for step, seconds in medians.items():
        print(f"{step:12} {seconds:6.2f} s")
    report(output, repeats=repeats, seconds_from_the_command=medians)


if __name__ == "__main__":
    main()
