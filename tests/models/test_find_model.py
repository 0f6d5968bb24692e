"""What fits a model only in part: refused by its own key, or drawn as diffusers means it."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdbatch.engine.engine import Engine
from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.find_model import Extras
from sdbatch.models.schedulers import make_scheduler
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.loading import Build
from sdbatch.samplers import NAMES

RANK, ALPHA = 4, 16


def load(folder, **extras):
    files = find_model.find(str(folder), None, "", Extras(**extras))
    return loading.load(files, Build("cpu", "float32"))


@pytest.fixture
def scaled_lora(tiny_model, tmp_path):
    """A LoRA whose scale, alpha / rank = 4, stands in the file's metadata."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"])
    pipe.unet.add_adapter(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, weight in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        weight_name="scaled.safetensors",
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    return tmp_path / "scaled.safetensors"


def test_a_loras_own_scale_is_that_of_its_metadata(tiny_model, scaled_lora):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.load_lora_weights(str(scaled_lora))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = load(tiny_model, loras=((str(scaled_lora), 1.0),)).unet.state_dict()
    assert all(torch.allclose(ours[name], w) for name, w in pipe.unet.state_dict().items())


def test_a_lora_that_fits_only_in_part_is_refused(tiny_model, scaled_lora):
    weights = load_file(scaled_lora)
    some = [name for name in weights if "up_blocks" in name]
    for name in some:
        weights[name.replace("up_blocks.", "up_blocks.7")] = weights.pop(name)
    save_file(weights, scaled_lora)
    words = rf"^model.loras.0.path = .*: {len(some)} of its {len(weights)} weights fit no layer"
    with pytest.raises(ModelError, match=words.replace(": ", ".*")):
        load(tiny_model, loras=((str(scaled_lora), 1.0),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, not 0.18215"),
        ({"shift_factor": 0.1}, "its shift_factor is 0.1, not None"),
        ({"latent_channels": 16}, "its latent_channels is 16, not 4"),
        (
            {
                "block_out_channels": (8, 16, 32),
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
            },
            "latents of another size",
        ),
    ],
)
def test_a_vae_whose_latents_are_not_the_models_is_refused(tiny_model, tmp_path, change, words):
    config = {**AutoencoderKL.load_config(tiny_model / "vae"), **change}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match=rf"^model.vae = .*{words}"):
        load(tiny_model, vae=str(tmp_path / "vae"))


def test_a_vae_that_lacks_weights_is_refused_by_its_own_key(tiny_model, tmp_path):
    shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"^model.vae = .*lacks decoder.conv_in.weight"):
        load(tiny_model, vae=str(tmp_path / "vae"))


@pytest.mark.parametrize("sampler", [name for name in NAMES if name.endswith("_beta")])
def test_schedules_with_timesteps_that_round_to_the_same_are_stepped_to_the_end(model, sampler):
    scheduler = make_scheduler(sampler, model.scheduler_config, 60)
    latents = torch.zeros(1, 4, 2, 2)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert torch.isfinite(latents).all()


def test_how_a_models_author_liked_to_sample_does_not_change_what_a_samplers_name_means(model):
    liked = {"use_karras_sigmas": True, "solver_order": 3, "thresholding": True}
    for sampler in ("euler", "dpmpp_2m", "unipc", "euler_ays", "dpmpp_2m_beta"):
        plain = make_scheduler(sampler, model.scheduler_config, 8)
        other = make_scheduler(sampler, {**model.scheduler_config, **liked}, 8)
        assert torch.equal(plain.timesteps, other.timesteps)
        assert plain.config == other.config


def test_larger_images_get_fewer_lanes_by_their_area_alone(model, request_for):
    engine = Engine(model, lanes=16, threads=1, pixels=64 * 64)
    sizes = {(64, 64): 16, (16, 16): 16, (64, 128): 8, (128, 128): 4, (256, 256): 2}
    for (height, width), lanes in sizes.items():
        request = request_for(height=height, width=width, num_inference_steps=1)
        assert engine.submit(request).result().lanes == lanes
    engine.close()


def test_a_callback_that_raises_ends_no_other_request(model, request_for, capfd):
    engine = Engine(model, lanes=4, threads=1)

    def raises(_):
        raise KeyboardInterrupt("of a callback")

    futures = [engine.submit(request_for(seed=seed)) for seed in range(6)]
    futures[0].add_done_callback(raises)
    assert [future.result(timeout=30).lanes for future in futures] == [4] * 6
    engine.close()
    assert "of a callback" in capfd.readouterr().err


def test_a_failed_request_holds_no_tensors_of_the_call_that_failed(model, request_for, monkeypatch):
    engine = Engine(model, lanes=2, threads=1)

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engine._sd, "denoise", full)
    error = engine.submit(request_for()).exception()
    engine.close()
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "tick" not in frames


def test_a_checker_of_plain_weights_in_a_folder_of_a_variant_is_found_and_hashed(
    tiny_model, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    checker = folder / find_model.CHECKER
    checker.mkdir()
    (checker / "config.json").write_text(json.dumps({}))
    (checker / "model.safetensors").write_bytes(b"weights")
    files = find_model.find(str(folder), None, "", Extras())
    assert (files.extras.variant, find_model.checker_variant(files)) == ("fp16", None)
    assert checker / "model.safetensors" in find_model.hashed(files)
