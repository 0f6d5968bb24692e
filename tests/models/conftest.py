"""The tiny model's fixtures, and files of every kind that a job may name besides its model."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import oracle
from sdbatch.models.find_model import CHECKER
from tests.models.load import RunsCode
from tests.sd1 import (  # noqa: F401  fixtures
    model,
    new_engine,
    other_model,
    request_for,
)
from tests.tiny import TEXT_WIDTH

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def pipeline(model):  # noqa: F811
    """diffusers' pipeline over the parts of `model`."""
    return oracle.pipeline(model)


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "copied")


@pytest.fixture
def extra_files(tmp_path, other_model, monkeypatch):  # noqa: F811
    """A folder with files of every kind, whole or not; it is the working folder, too."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("lora", 32), ("wide_lora", 99)):
        lora = {f"{TO_Q}.lora_down.weight": torch.ones(4, width)}
        save_file(lora | {f"{TO_Q}.lora_up.weight": torch.ones(32, 4)}, f"{name}.safetensors")
    for name, width in (("word", TEXT_WIDTH), ("wide_word", 99)):
        save_file({"emb_params": torch.ones(2, width)}, f"{name}.safetensors")
        torch.save({"<word>": torch.ones(2, width)}, f"{name}.pt")
    torch.save({"<word>": torch.zeros(1, TEXT_WIDTH), "extra": RunsCode()}, "hostile.pt")
    save_file({"<word>": torch.ones(1, TEXT_WIDTH), "two": torch.ones(1)}, "two_words.safetensors")
    save_file({}, "no_tensors.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    (tmp_path / "null.safetensors").write_bytes((4).to_bytes(8, "little") + b"null and more")
    (tmp_path / "empty").mkdir()
    shutil.copytree(other_model / "vae", "vae")
    shutil.copytree(other_model / "vae", "vae_without_weights")
    (tmp_path / "vae_without_weights" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy("vae/diffusion_pytorch_model.safetensors", "vae.safetensors")
    write_checker(tmp_path / CHECKER)
    return tmp_path


def write_checker(folder):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 32}
    config = CLIPConfig(vision_config=vision, text_config={}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder)
