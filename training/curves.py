"""`python -m training.curves FOLDER`: plot the loss of each network over its steps."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from training import loop
from training.__main__ import NETWORKS

PLOT_FILE, NUMBERS_FILE = "curves.png", "curves.json"


def plot_curves(folder: Path, target: Path) -> None:
    """Plot the loss curves of the trainings in `folder`; write plot and numbers to `target`."""
    curves = {name: loop.read_curve(folder / name) for name in NETWORKS}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(NETWORKS)), curves.items(), strict=True):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
        hours = sum(line["seconds_a_step"] for line in lines) * loop.REPORT_EVERY / 3600
        axes.set_title(f"{name}: {lines[-1]['step']:,} steps, {hours:.1f} h")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, mean of 50 steps")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(target / PLOT_FILE, dpi=120)
    (target / NUMBERS_FILE).write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    plot_curves(Path(sys.argv[1]), Path(__file__).parent)
