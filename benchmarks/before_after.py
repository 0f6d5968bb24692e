"""Run a benchmark with two states of the code in turns, and compare its rates.

    python benchmarks/before_after.py REVISION [--turns 3] engine.py --requests 48 --repeats 1

REVISION is a commit or branch of this repository: its state is checked out next to this one, and
each state runs its own script of that name. Compared are all figures of the script's JSON whose
names end in images_per_s; the ratio is after to before, of the medians. Prints a table and, on the
last line, JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from findings import report

ROOT = Path(__file__).parent.parent


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Yield a folder with another state of this repository."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="before-") as parent:
        folder = Path(parent, "state")
        subprocess.run([*git, "add", "--detach", str(folder), revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def rates(values: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield the dotted name and value of each rate in nested values."""
    if isinstance(values, dict):
        for name, value in values.items():
            inner = f"{where}.{name}".lstrip(".")
            if name.endswith("images_per_s") and isinstance(value, int | float):
                yield inner, float(value)
            else:
                yield from rates(value, inner)


def run(state: Path, script: str, arguments: tuple[str, ...]) -> dict[str, float]:
    """Run the script with the code in `state`; return its rates."""
    command = [sys.executable, str(state / "benchmarks" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(state)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} with {state}: exit code {done.returncode}\n{done.stderr}")
    return dict(rates(json.loads(done.stdout.splitlines()[-1])))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision")
@click.option("--turns", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    revision: str, turns: int, output: Path | None, script: str, arguments: tuple[str, ...]
) -> None:
    """Compare this state of the code with that of REVISION."""
    with checked_out(revision) as before:
        found: dict[Path, list[dict[str, float]]] = {before: [], ROOT: []}
        for turn in range(turns):
            for state in (before, ROOT) if turn % 2 == 0 else (ROOT, before):
                found[state].append(run(state, script, arguments))
    results = {}
    for name in found[ROOT][0]:
        old, new = (
            statistics.median(each[name] for each in found[state]) for state in (before, ROOT)
        )
        results[name] = {"before": old, "after": new, "ratio": round(new / old, 3)}
        print(f"{name:44} {old:9.2f} -> {new:9.2f} images/s   {new / old:.3f}", flush=True)
    command = f"{script} {' '.join(arguments)}".strip()
    report(output, revision=revision, script=command, turns=turns, found=results)


if __name__ == "__main__":
    main()
