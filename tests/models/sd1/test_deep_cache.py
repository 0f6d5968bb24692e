"""Calls of the UNet that reuse its deep features, compared with whole calls of diffusers' own."""

import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdbatch.job import Model, Safety
from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.deep_cache import DEEP
from sdbatch.models.sd1.family import LORAS, TEXT, StableDiffusion1
from sdbatch.registry import EMBEDDED_MODEL
from tests.models.load import MOST_COUNTS, assert_as_diffusers, difference, draw, load
from tests.models.sd1.test_row_loras import plain, write_network

LANES = 3
BUILDS = [
    Build("cpu", dtype, channels_last)
    for dtype in ("float32", "bfloat16")
    for channels_last in (False, True)
]


def inputs_of(model, side=8, seed=0):
    """Return latents, timesteps and text of LANES lanes."""
    generator = torch.Generator().manual_seed(seed)
    width = model.unet.config.cross_attention_dim
    latents = torch.randn(LANES, 4, side, side, generator=generator)
    text = torch.randn(LANES, 77, width, generator=generator).to(model.dtype)
    return latents, torch.tensor([900.0, 400.0, 20.0]), {TEXT: text}


@pytest.mark.parametrize("path", ["tiny", EMBEDDED_MODEL])
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_a_whole_call_answers_as_without_a_cache_and_a_shallow_one_as_the_whole(
    tiny_model, path, build
):
    files = find_model(
        Model(path=str(tiny_model) if path == "tiny" else path), Safety(checker="none")
    )
    model = loading.load(files, build)
    family = StableDiffusion1(model)
    with torch.inference_mode():
        given, cache = inputs_of(model), {}
        plain_answer = family.denoise(*given)
        assert torch.equal(family.denoise(*given, cache), plain_answer)
        assert [*cache] == [DEEP]
        assert torch.equal(family.denoise(*given, cache), plain_answer)
        deep = cache[DEEP]
        other = family.denoise(*inputs_of(model, seed=1), cache)
        assert cache[DEEP] is deep
        assert not torch.equal(other, family.denoise(*inputs_of(model, seed=1)))


def test_a_shallow_call_computes_only_the_outer_layers(model):
    family, called = StableDiffusion1(model), []
    layer = re.compile(r"(down|up)_blocks\.\d\.(resnets|attentions)\.\d|mid_block")
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in model.unet.named_modules()
        if layer.fullmatch(name)
    ]
    try:
        cache = {}
        with torch.inference_mode():
            family.denoise(*inputs_of(model), cache)
            assert "mid_block" in called
            called.clear()
            family.denoise(*inputs_of(model), cache)
    finally:
        for hook in hooks:
            hook.remove()
    assert called == ["up_blocks.1.resnets.1", "up_blocks.1.attentions.1"]


@contextmanager
def old_features(unet, interval):
    """Let whole calls of the UNet compute with old deep features, but for every `interval`-th."""
    calls, seen = count(), []

    def keep_or_replace(layer, arguments):
        joined, time = arguments
        deep = joined.shape[1] - unet.config.block_out_channels[0]
        if next(calls) % interval == 0:
            seen[:] = [joined[:, :deep]]
        return torch.cat([seen[0], joined[:, deep:]], dim=1), time

    hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep_or_replace)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_karras", "heun", "pndm"])
@pytest.mark.parametrize("interval", [2, 3])
def test_an_image_is_what_diffusers_draws_with_the_features_of_the_last_whole_call(
    model, pipeline, request_for, sampler, interval
):
    request = request_for(sampler=sampler, num_inference_steps=8, cache_interval=interval)
    [drawn] = draw(model, [request])
    with old_features(model.unet, interval):
        assert_as_diffusers(drawn, pipeline, request, model.scheduler_config)
    [whole] = draw(model, [request_for(sampler=sampler, num_inference_steps=8)])
    assert difference(drawn.image, whole.image) > MOST_COUNTS


def test_loras_by_row_apply_to_shallow_calls_too(tiny_model, model, tmp_path):
    path = write_network(tmp_path / "style.safetensors", model, plain)
    lora = load(tiny_model, loras=[Lora(path=path, name="style")])
    family = StableDiffusion1(lora)
    latents, times, text = inputs_of(lora)
    styled = {**text, LORAS: torch.tensor([[0.0], [1.0], [0.5]])}
    without = {**text, LORAS: torch.zeros(LANES, 1)}
    with torch.inference_mode():
        cache = {}
        whole = family.denoise(latents, times, styled, cache)
        assert torch.equal(family.denoise(latents, times, styled, cache), whole)
        shallow = family.denoise(latents, times, without, cache)
    assert torch.equal(shallow[0], whole[0])
    assert not torch.equal(shallow[1], whole[1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ({"compile": True}, "if the UNet is compiled. Set engine.compile to false"),
        ({"rewrites": ("graphs",)}, "with graphs in engine.rewrites. Leave graphs out"),
    ],
)
def test_a_unet_that_is_one_call_rejects_it(model, request_for, build, words):
    family = StableDiffusion1(replace(model, build=replace(model.build, **build)))
    with pytest.raises(ValueError, match=f"cache_interval = 3: must be 1 {words}"):
        family.read(request_for(cache_interval=3))
    family.read(request_for())


@pytest.mark.parametrize(
    "unusual",
    [
        {"center_input_sample": True},
        {"time_embedding_act_fn": "gelu"},
        {"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")},
    ],
    ids=str,
)
def test_a_unet_with_other_outer_layers_rejects_it(model, request_for, unusual):
    unet = UNet2DConditionModel.from_config({**model.unet.config, **unusual})
    family = StableDiffusion1(replace(model, unet=unet))
    with pytest.raises(ValueError, match="cache_interval = 2: must be 1, this model's UNet has"):
        family.read(request_for(cache_interval=2))
