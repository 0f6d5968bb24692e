"""Seamless tiling: what is at one edge continues at the opposite one, as with diffusers' layers."""

import re

import pytest
import torch
from torch import nn

from benchmarks import oracle
from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.output import identity
from tests.models.load import assert_as_diffusers, draw, load
from tests.models.sd1.test_rewrites import ON_A_CPU, assert_equal_but_for_rounding, outputs
from tests.models.sd1.test_row_loras import by_row, plain, write_network

SHIFTS = [(0, 1), (3, 0), (-2, 5)]  # of latents
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "plain"])


def built(folder, names=(), dtype="float64", channels_last=True, **settings):
    build = Build("cpu", dtype, channels_last=channels_last, rewrites=tuple(names))
    return load(folder, build, **{"tiling": True, **settings})


def decoded(model, latents):
    return model.vae.decode(latents.to(model.dtype), return_dict=False)[0]


@LAYOUTS
@pytest.mark.parametrize("names", [(), ("phase_upsample",)], ids=["plain blocks", "rewritten"])
@torch.inference_mode()
def test_a_picture_of_shifted_latents_is_the_shifted_picture(tiny_model, names, channels_last):
    tiling = built(tiny_model, names, channels_last=channels_last)
    latents = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    pictures = decoded(tiling, latents)
    for shift in SHIFTS:
        of_picture = [8 * places for places in shift]
        ours = decoded(tiling, latents.roll(shift, (2, 3)))
        expected = pictures.roll(of_picture, (2, 3))
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    bordered = built(tiny_model, names, tiling=False)
    moved = decoded(bordered, latents.roll(4, 3)).roll(-32, 3)
    assert not torch.allclose(moved, decoded(bordered, latents), rtol=1e-3)


@LAYOUTS
@pytest.mark.parametrize("names", [(), *((name,) for name in ON_A_CPU), ON_A_CPU], ids=str)
@torch.inference_mode()
def test_the_unet_sees_no_edge(tiny_model, request_for, names, channels_last):
    family = StableDiffusion1(built(tiny_model, names, channels_last=channels_last))
    conditions, _ = family.embed([family.read(request_for())], [])
    latents, times = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    # by 2, as the tiny UNet halves the size once
    ours = family.denoise(latents.roll((2, -4), (2, 3)), times, conditions, first_lanes=[0])
    expected = family.denoise(latents, times, conditions, first_lanes=[0]).roll((2, -4), (2, 3))
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_rewrite_computes_the_same_with_tiling(tiny_model, request_for, name):
    for size in (8, 9):  # 9 is not doubled
        plain_model, rewritten = (built(tiny_model, names) for names in ((), [name]))
        ours, theirs = (outputs(each, request_for, size) for each in (rewritten, plain_model))
        assert_equal_but_for_rounding(ours, theirs)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_karras", "euler_a", "heun"])
def test_an_image_is_that_of_diffusers_pipeline_with_circular_convolutions(
    tiny_model, request_for, sampler
):
    pipe = oracle.pipeline(load(tiny_model))
    for part in (pipe.unet, pipe.vae):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular"
    tiling = load(tiny_model, tiling=True)
    request = request_for(sampler=sampler)
    (drawn,) = draw(tiling, [request])
    assert_as_diffusers(drawn, pipe, request, tiling.scheduler_config)
    (bordered,) = draw(load(tiny_model), [request])
    assert (bordered.image != drawn.image).any()


@torch.inference_mode()
def test_pictures_are_encoded_with_circular_convolutions(tiny_model):
    pictures = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    tiling, bordered = (built(tiny_model, tiling=value).vae for value in (True, False))
    assert not torch.allclose(
        tiling.encode(pictures).latent_dist.mean, bordered.encode(pictures).latent_dist.mean
    )
    assert {
        layer.padding_mode for layer in tiling.encoder.modules() if isinstance(layer, nn.Conv2d)
    } == {"circular"}


@torch.inference_mode()
def test_a_picture_that_is_decoded_again_in_float32_has_no_seam(tiny_model):
    family = StableDiffusion1(built(tiny_model, dtype="bfloat16"))
    latents = torch.randn(1, 4, 8, 8)
    picture = family.decode(latents, torch.float32).pixels.int()
    moved = family.decode(latents.roll(4, 3), torch.float32).pixels.roll(-32, 2).int()
    assert (picture - moved).abs().max() <= 1  # float32 rounds to the other count


@torch.inference_mode()
def test_loras_by_row_see_no_edge(tiny_model, model, tmp_path):
    layers = re.compile(r"conv_in$|resnets.*conv1$|upsamplers\.0\.conv$")
    file = write_network(tmp_path / "ink.safetensors", model, plain, layers)
    fused = built(tiny_model, loras=[Lora(path=file)])
    rows = built(tiny_model, ["phase_upsample"], loras=by_row({"ink": file}))
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    text, times = torch.randn(1, 77, 32, dtype=torch.float64), torch.tensor([500.0])
    with rows.row_loras.apply(torch.ones(1, 1)):
        ours = rows.call_unet(latents, times, text)
    expected = fused.call_unet(latents, times, text)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()  # a LoRA is float32


def test_tiling_is_a_part_of_what_identifies_an_output(make_job):
    plain_job, tiling = (
        make_job(model={"path": "builtin:shapes", "tiling": value}) for value in (False, True)
    )
    assert identity.fingerprint(plain_job, {}) != identity.fingerprint(tiling, {})
