"""Which models and files are found, and which are rejected before anything is loaded."""

import json
import shutil

import pytest
import torch

from sdbatch.errors import ModelError
from sdbatch.registry import EMBEDDED_MODEL
from tests.models.load import (
    CHECKER_KEY,
    EMBEDDING_KEY,
    LORA_KEY,
    VAE_KEY,
    RunsCode,
    find,
    settings_with,
)

FILE = "must be a local file that ends in .*Download it first; a hub id does not work here"
FOLDER = "must be a local folder with config.json and weights.*a hub id does not work here"
UNREADABLE = "cannot be read as weights"


@pytest.mark.parametrize(
    ("key", "path", "reason"),
    [
        (LORA_KEY, "missing.safetensors", FILE),
        (LORA_KEY, "someone/some-lora", FILE),
        (LORA_KEY, "empty", FILE),
        (LORA_KEY, "word.pt", FILE),
        (LORA_KEY, "vae.safetensors", "holds no LoRA"),
        (LORA_KEY, "torn.safetensors", UNREADABLE),
        (LORA_KEY, "null.safetensors", UNREADABLE),
        (EMBEDDING_KEY, "missing.pt", FILE),
        (EMBEDDING_KEY, "sd-concepts-library/cat-toy", FILE),
        (EMBEDDING_KEY, "torn.pt", UNREADABLE),
        (EMBEDDING_KEY, "hostile.pt", "its pickle would run posix.system, so it was not opened"),
        (VAE_KEY, "missing.safetensors", FILE),
        (VAE_KEY, "stabilityai/sd-vae-ft-mse", FILE),
        (VAE_KEY, "torn.safetensors", UNREADABLE),
        (VAE_KEY, "empty", FOLDER),
        (VAE_KEY, "vae_without_weights", FOLDER),
        (CHECKER_KEY, "CompVis/stable-diffusion-safety-checker", FOLDER),
        (CHECKER_KEY, "empty", FOLDER),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_rejected_before_anything_is_loaded(
    tiny_model, extra_files, key, path, reason
):
    with pytest.raises(ModelError, match=rf"^{key} = .*{path}.*{reason}") as rejected:
        find(tiny_model, **settings_with(key, path))
    assert "\n" not in str(rejected.value)
    assert not (extra_files / "OWNED").exists()


def test_a_pickle_that_would_run_code_is_rejected_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {key: torch.zeros(1)}, "extra": RunsCode()}, "model.ckpt")
    with pytest.raises(
        ModelError, match=r"model.ckpt: its pickle would run posix.system.*safetensors"
    ):
        find("model.ckpt")
    assert not (tmp_path / "OWNED").exists()


def test_a_path_without_a_model_is_rejected_with_the_way_out(tmp_path, tiny_model):
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_bytes(b"no model at all")
    (tmp_path / "text.txt").write_text("hello")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    cases = {
        "half": "no weights in unet/",
        "empty": "has no model_index.json",
        "junk.safetensors": UNREADABLE,
        "text.txt": "must end in .safetensors or .ckpt",
        "other.ckpt": "holds no model of a known family",
        "missing/folder/deep": "no such file or folder",
    }
    for name, reason in cases.items():
        with pytest.raises(ModelError, match=reason):
            find(tmp_path / name)
    with pytest.raises(ModelError, match=f"the only embedded model is {EMBEDDED_MODEL}"):
        find("builtin:dogs")
    for path in (tiny_model, EMBEDDED_MODEL):
        with pytest.raises(ModelError, match=r"model.revision = 'main': only a hub id has one"):
            find(path, revision="main")
    with pytest.raises(ModelError, match="the hub did not deliver it"):
        find("no-such/model")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (json.dumps({"_class_name": "FluxPipeline"}), "names the pipeline 'FluxPipeline': must be"),
        ("{", "its model_index.json cannot be read"),
        ("[1]", "its model_index.json cannot be read"),
    ],
)
def test_a_folder_of_an_unknown_pipeline_is_rejected(copied, index, reason):
    (copied / "model_index.json").write_text(index)
    with pytest.raises(ModelError, match=rf"^model.path = .*copied.*{reason}") as rejected:
        find(copied)
    assert "\n" not in str(rejected.value)
