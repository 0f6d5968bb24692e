"""The shared prefix: both lanes of a guided image at once, and the same bits for every row."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Follow
from sdbatch.errors import ModelError
from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import LORAS, TEXT, StableDiffusion1
from sdbatch.models.sd1.row_loras import RowLoras
from sdbatch.models.sd1.shared_prefix import SharedPrefix
from sdbatch.registry import EMBEDDED_MODEL
from tests.models.load import draw, load
from tests.models.sd1.test_row_loras import plain, write_network

LANES = {  # of each lane the first of its image; missing ones are padding
    "all guided": (6, [0, 1, 2, 0, 1, 2]),
    "some guided": (6, [0, 1, 2, 3, 0, 1]),
    "none guided": (6, [0, 1, 2, 3, 4, 5]),
    "two cohorts": (6, [0, 1, 0, 1, 4, 4]),
    "padded": (6, [0, 1, 0, 1]),
    "padded, some guided": (6, [0, 1, 0]),
    "an odd number": (5, [0, 1, 2, 3, 0]),
    "one": (1, [0]),
}


def built(path, dtype="float64", names=("shared_prefix",), channels_last=True, **settings):
    build = Build("cpu", dtype, channels_last=channels_last, rewrites=names)
    return load(path, build, **settings)


def inputs_of(model, lanes, firsts, side=8):
    """Return latents, timesteps and conditions whose lanes are equal as `firsts` says."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(lanes, 4, side, side, generator=generator)
    text = torch.randn(lanes, 77, model.unet.config.cross_attention_dim, generator=generator)
    index = torch.tensor([*firsts, *range(len(firsts), lanes)])
    times = torch.linspace(20, 900, lanes)
    return latents[index], times[index], {TEXT: text.to(model.dtype)}


@torch.inference_mode()
def assert_as_plain(shared, plain_model, lanes, firsts, side=8):
    given = inputs_of(shared, lanes, firsts, side)
    ours = StableDiffusion1(shared).denoise(*given, first_lanes=firsts)[: len(firsts)]
    theirs = StableDiffusion1(plain_model).denoise(*given)[: len(firsts)]
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("layout", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("lanes", "firsts"), LANES.values(), ids=LANES)
def test_the_answer_is_that_of_the_plain_unet(tiny_model, lanes, firsts, layout, side):
    models = (built(tiny_model, names=n, channels_last=layout) for n in (("shared_prefix",), ()))
    assert_as_plain(*models, lanes, firsts, side)


def test_a_unet_whose_first_level_has_no_text_shares_more():
    shared, plain_model = (built(EMBEDDED_MODEL, names=n) for n in (("shared_prefix",), ()))
    assert_as_plain(shared, plain_model, *LANES["all guided"])
    assert_as_plain(shared, plain_model, *LANES["some guided"])


@torch.inference_mode()
def rows_of_calls(model, lanes, firsts):
    """Return the rows of each call of the first layer and of the first self-attention."""
    transformer = model.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    calls = {"conv_in": [], "attn1": [], "attn2": []}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: calls[name].append(len(inputs[0]))
        )
        for name, layer in (
            ("conv_in", model.unet.conv_in),
            ("attn1", transformer.attn1),
            ("attn2", transformer.attn2),
        )
    ]
    StableDiffusion1(model).denoise(*inputs_of(model, lanes, firsts), first_lanes=firsts)
    for hook in hooks:
        hook.remove()
    return calls


def test_guided_images_take_half_the_lanes_up_to_the_text_and_others_all(tiny_model):
    model = built(tiny_model)
    cases = {"all guided": [3], "padded": [3], "some guided": [3, 6], "none guided": [6]}
    for case, calls in cases.items():
        expected = {"conv_in": calls, "attn1": calls, "attn2": [6]}
        assert rows_of_calls(model, *LANES[case]) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(
    tiny_model, request_for, dtype, interval
):
    model = built(tiny_model, dtype)
    ways = [
        {},
        {"guidance_scale": 1.0},
        {"guidance_stop": 0.5},
        {"guidance_start": 0.5, "guidance_rescale": 0.6},
        {"sampler": "euler_a"},
    ]
    requests = [
        request_for(seed=i, num_inference_steps=4 + i, cache_interval=interval, **way)
        for i, way in enumerate(ways)
    ]
    for one, alone in zip(draw(model, requests[::-1])[::-1], requests, strict=True):
        assert np.array_equal(one.image, draw(model, [alone])[0].image)


def test_a_preview_does_not_depend_on_its_neighbours(tiny_model, request_for):
    model = built(tiny_model, "float32")

    def preview(*others):
        previews = []
        follow = Follow(lambda step, steps: None, previews.append, previews=1)
        engine = Engine(StableDiffusion1(model), lanes=8, threads=1)
        futures = [engine.submit(other) for other in others]
        futures.append(engine.submit(request_for(seed=7), follow=follow))
        for future in futures:
            future.result()
        engine.close()
        return previews[0].image

    others = [request_for(seed=i, guidance_scale=(1.0, 6.0)[i % 2]) for i in range(4)]
    assert np.array_equal(preview(), preview(*others))


@pytest.mark.parametrize("case", ["all guided", "some guided", "padded"])
@torch.inference_mode()
def test_a_lora_by_row_adds_to_the_prefix_of_its_own_image(tiny_model, model, tmp_path, case):
    layers = re.compile(r"conv_in$|time_embedding\.l|attn1\.to_[qkv]$|resnets.*conv|proj_in")
    file = write_network(tmp_path / "ink.safetensors", model, plain, layers)
    loras = {"loras": [Lora(path=file, name="ink")]}
    lanes, firsts = LANES[case]
    weights = torch.linspace(-1, 1, lanes)[[*firsts, *range(len(firsts), lanes)]][:, None]
    answers = []
    for names in ((), ("shared_prefix",)):
        own = built(tiny_model, names=names, **loras)
        latents, times, text = inputs_of(own, lanes, firsts)
        denoise = partial(StableDiffusion1(own).denoise, latents, times, first_lanes=firsts)
        answers += [denoise({**text, LORAS: each}) for each in (weights, torch.zeros(lanes, 1))]
    expected, without, ours, _ = (answer[: len(firsts)] for answer in answers)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not torch.allclose(ours, without, rtol=1e-3)


@pytest.mark.parametrize(
    "unusual",
    [
        {"center_input_sample": True},
        {"use_linear_projection": True},
        {"only_cross_attention": True},
        {"down_block_types": ("DownBlock2D", "DownBlock2D")},
        {"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")},
    ],
    ids=str,
)
def test_a_unet_with_other_layers_rejects_it(model, unusual):
    unet = UNet2DConditionModel.from_config({**model.unet.config, **unusual})
    loras = RowLoras({}, {}, torch.nn.Module(), compiled=False)
    with pytest.raises(ModelError, match=r"'shared_prefix': .* Leave shared_prefix out"):
        SharedPrefix(unet, loras)
