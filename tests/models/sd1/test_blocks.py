"""The blocks that replace diffusers' own: bit by bit the same, and only where they may."""

import copy

import pytest
import torch

from sdbatch.models.sd1 import blocks
from sdbatch.models.sd1.blocks import PlainAttention, Resnet, Transformer
from tests import tiny

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.fixture(scope="module")
def parts():
    """A UNet and a VAE in diffusers' own classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny._random_unet().eval(), tiny._random_vae().eval()


@torch.inference_mode()
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_bit_differs_from_diffusers_blocks(parts, dtype, layout):
    unet, vae = (copy.deepcopy(part).to(dtype).to(memory_format=layout) for part in parts)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator).to(dtype, memory_format=layout)
    text = torch.randn(3, 77, tiny.TEXT_WIDTH, generator=generator).to(dtype)
    times = torch.tensor([1.0, 500.0, 999.0])

    def outputs():
        noise = unet(latents, times, encoder_hidden_states=text, return_dict=False)[0]
        return noise, vae.decode(latents, return_dict=False)[0]

    expected = outputs()
    blocks.replace(unet)
    blocks.replace(vae.decoder)
    for ours, theirs in zip(outputs(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_all_blocks_of_the_model_are_replaced_and_keep_their_weights(model, parts):
    unet = parts[0]
    kinds = [type(module).__name__ for module in [*model.unet.modules()]]
    kinds += [type(module).__name__ for module in model.vae.decoder.modules()]
    assert not {"ResnetBlock2D", "Transformer2DModel"} & set(kinds)
    assert {"Resnet", "Transformer"} < set(kinds)
    assert {type(each) for each in model.unet.attn_processors.values()} == {PlainAttention}
    assert set(model.unet.state_dict()) == set(unet.state_dict())


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (Resnet, "output_scale_factor", 2.0),
        (Resnet, "time_embedding_norm", "scale_shift"),
        (Resnet, "nonlinearity", torch.nn.GELU()),
        (Transformer, "use_linear_projection", True),
        (PlainAttention, "rescale_output_factor", 2.0),
    ],
)
def test_a_block_of_another_kind_stays_as_it_is(parts, part, name, value):
    unet = copy.deepcopy(parts[0])
    level = unet.down_blocks[0]
    attention = level.attentions[0].transformer_blocks[0].attn1
    found = {Resnet: level.resnets[0], Transformer: level.attentions[0], PlainAttention: attention}
    setattr(found[part], name, value)
    blocks.replace(unet)
    assert found[part] in list(unet.modules())
    assert not isinstance(attention.processor, PlainAttention) or part is not PlainAttention
    assert isinstance(unet.mid_block.resnets[0], Resnet)
