"""The whole training command in its miniature: the losses fall, and what it leaves is a model."""

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
pytestmark = pytest.mark.timeout(900)  # whichever comes first waits for the training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(folder)
    return folder


def train(folder):
    """Run the command; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "training", str(folder), "--miniature"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("network", NETWORKS)
def test_the_losses_fall(folder, network):
    curve = [line["loss"] for line in loop.curve(folder / network)]
    assert len(curve) > 1
    assert curve[-1] < 0.8 * curve[0]


def test_the_curves_are_drawn_with_their_numbers_beside(folder, tmp_path):
    curves.draw(folder, tmp_path)
    with Image.open(tmp_path / curves.PLOT) as plot:
        assert plot.size > (800, 300)
    numbers = json.loads((tmp_path / curves.NUMBERS).read_text())
    assert numbers == {name: loop.curve(folder / name) for name in NETWORKS}


def test_the_model_is_one_of_diffusers_in_float16(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    images = pipe("a red star", num_inference_steps=2, generator=noise, output_type="np").images
    assert images.shape == (1, 128, 128, 3)
    files = list((folder / "model").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_a_finished_training_is_not_done_again(folder):
    def weights():
        return {file: file.read_bytes() for file in (folder / "model").rglob("*.safetensors")}

    before = weights()
    assert "loss" not in train(folder)
    assert weights() == before
