"""Models load from every layout with the weights they were made of, and never with random ones."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdbatch.errors import ModelError
from sdbatch.job import Model
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models.build import Build
from sdbatch.models.find_model import CHECKER, ModelFiles
from sdbatch.models.sd1 import LAYOUT, loading
from tests import tiny
from tests.models.load import RunsCode, find, have_same_weights, load, load_with_checker
from tests.sd1 import BUILD

FAMILY = "sdbatch.models.sd1"


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_loads_the_weights_of_the_folder_it_was_made_from(
    tiny_model, tmp_path, model, suffix
):
    file = tmp_path / f"model.{suffix}"
    tiny.write_file(tiny_model, file)
    loaded = load(file, config=str(tiny_model))
    assert have_same_weights(loaded, model)
    assert loaded.scheduler_config == model.scheduler_config


def test_weights_load_in_the_dtype_of_the_build(tiny_model):
    assert load(tiny_model, Build("cpu", "bfloat16")).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("vae", ["vae", "vae.safetensors"])
def test_files_named_besides_the_model_load_from_any_working_folder_in_the_dtype_of_the_build(
    tiny_model, extra_files, monkeypatch, vae
):
    loras = [Lora(path="lora.safetensors", weight=0.5)]
    embeddings = [Embedding(path="word.pt", token="<word>")]
    files = find(tiny_model, vae=vae, checker=CHECKER, loras=loras, embeddings=embeddings)
    monkeypatch.chdir("/")  # an actor may have another working folder
    loaded, checker = load_with_checker(files, Build("cpu", "bfloat16"))
    parts = [checker._checker, *(getattr(loaded, part) for part in LAYOUT.weights)]
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}


def test_loading_does_not_run_the_code_in_a_pickle_that_was_not_checked(
    tmp_path, monkeypatch, tiny_model
):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": RunsCode()}, "model.ckpt")
    # without ema, so that loading does not look at the names in it
    settings = Model(path="model.ckpt", config=str(tiny_model), ema=False)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load(ModelFiles("file", "model.ckpt", FAMILY, settings), BUILD)
    assert not (tmp_path / "OWNED").exists()


def test_loading_does_not_run_the_code_in_an_embedding_that_was_not_checked(
    tiny_model, extra_files
):
    settings = Model(path=str(tiny_model), embeddings=[Embedding(path="hostile.pt", token="<b>")])
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load(ModelFiles("folder", str(tiny_model), FAMILY, settings), BUILD)
    assert not (extra_files / "OWNED").exists()


def test_broken_weights_are_rejected_in_one_line(copied):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ModelError, match=r"model.path = .*copied.*cannot be read as weights"
    ) as rejected:
        load(copied)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "conv_in.weight"), ("vae", "conv_in.bias"), ("text_encoder", "norm.bias")],
)
def test_a_folder_without_some_weights_is_rejected_and_they_are_not_made_up(copied, part, name):
    (file,) = (copied / part).glob("*.safetensors")
    whole = load_file(file)
    save_file(
        {key: w for key, w in whole.items() if not key.endswith(name)}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"model.path = .*copied': cannot be loaded"):
        load(copied)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("first_stage_model.", "has no VAE .* Set model.vae"),
        ("cond_stage_model.", "has no text encoder"),
        ("model.diffusion_model.out.", "cannot be loaded"),
        ("first_stage_model.decoder.conv_out.", "weights of the VAE are missing"),
        ("cond_stage_model.transformer.text_model.final", "weights of text_encoder are missing"),
        ("model.diffusion_model.time_embed.0.bias", "weights of unet are missing"),
    ],
)
def test_a_single_file_without_a_part_is_rejected(tiny_model, tmp_path, missing, reason):
    file = tmp_path / "model.safetensors"
    tiny.write_file(tiny_model, file)
    save_file({key: w for key, w in load_file(file).items() if not key.startswith(missing)}, file)
    with pytest.raises(ModelError, match=rf"model.path = .*model.safetensors.*{reason}"):
        load(file, config=str(tiny_model))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("in_channels", 7, "in_channels 7"), ("time_cond_proj_dim", 16, "time_cond_proj_dim 16")],
)
def test_a_unet_with_more_inputs_is_rejected(copied, name, value, words):
    config = UNet2DConditionModel.load_config(copied / "unet")
    UNet2DConditionModel.from_config({**config, name: value}).save_pretrained(copied / "unet")
    reason = f"model.path = .*copied: is a model .*{words}.*must be a Stable Diffusion 1.x"
    with pytest.raises(ModelError, match=reason):
        load(copied)
