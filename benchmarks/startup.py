"""How long each step of a start takes: `sdbatch run jobs/dataset.yaml`, the main job, cold.

    python benchmarks/startup.py [--turns 5] [--before REVISION]

Seconds from the command to the end of each step, medians over fresh processes: the checks, Ray's
start, the model in an actor, the first image, the first shard, the end. With --before, the code and
the job of another commit of this repository run in turns with these. Prints a table and JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click
from before_after import ROOT, checked_out
from findings import report


def start_once(state: Path, folder: Path) -> dict[str, float]:
    """Run the main job of a state of the repository; return the seconds to each step."""
    main = "from sdbatch.cli import main; main()"
    output = f"output.path={folder / 'out'}"
    command = [sys.executable, "-c", main, "run", "jobs/dataset.yaml", "--json", "--set", output]
    environment = {**os.environ, "PYTHONPATH": str(state)}
    began = time.time()
    done = subprocess.run(
        command, cwd=state, env=environment, capture_output=True, text=True, check=True
    )
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
@click.option("--turns", default=5, show_default=True)
@click.option("--before", help="A commit or branch to compare with.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(turns: int, before: str | None, output: Path | None) -> None:
    """Measure the start of a run."""
    with ExitStack() as stack:
        states = {"after": ROOT}
        if before is not None:
            states = {"before": stack.enter_context(checked_out(before)), **states}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in states}
        for turn in range(turns):
            for name in list(states) if turn % 2 == 0 else reversed(states):
                with tempfile.TemporaryDirectory() as folder:
                    runs[name].append(start_once(states[name], Path(folder)))
    medians = {
        name: {step: round(statistics.median(r[step] for r in each), 2) for step in each[0]}
        for name, each in runs.items()
    }
    for step in medians["after"]:
        seconds = [each[step] for each in medians.values()]
        ratio = f"  {seconds[-1] / seconds[0]:.2f}" if before else ""
        print(f"{step:12} {'  '.join(f'{each:6.2f} s' for each in seconds)}{ratio}")
    report(output, turns=turns, before=before, seconds_from_the_command=medians)


if __name__ == "__main__":
    main()
