"""The training command with --miniature: the losses fall, and the result is a usable model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from training import curves, loop
from training.__main__ import NETWORKS

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for the training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(folder)
    return folder


def train(folder):
    """Run the command; return its output."""
    process = subprocess.run(
        [sys.executable, "-m", "training", str(folder), "--miniature"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("network", NETWORKS)
def test_the_losses_fall(folder, network):
    losses = [line["loss"] for line in loop.read_curve(folder / network)]
    assert len(losses) > 1
    assert losses[-1] < 0.8 * losses[0]


def test_plot_curves_writes_a_plot_and_its_numbers(folder, tmp_path):
    curves.plot_curves(folder, tmp_path)
    with Image.open(tmp_path / curves.PLOT_FILE) as plot:
        assert plot.size > (800, 300)
    numbers = json.loads((tmp_path / curves.NUMBERS_FILE).read_text())
    assert numbers == {name: loop.read_curve(folder / name) for name in NETWORKS}


def test_diffusers_loads_the_model_which_is_saved_in_float16(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    images = pipe("a red star", num_inference_steps=2, generator=noise, output_type="np").images
    assert images.shape == (1, 128, 128, 3)
    files = list((folder / "model").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_a_finished_training_is_not_repeated(folder):
    def weights():
        return {file: file.read_bytes() for file in (folder / "model").rglob("*.safetensors")}

    before = weights()
    assert "loss" not in train(folder)
    assert weights() == before
