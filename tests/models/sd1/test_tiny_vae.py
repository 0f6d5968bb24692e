"""A TAESD as the VAE, in each layout that it comes in, against diffusers' AutoencoderTiny."""

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from benchmarks import oracle
from sdbatch.engine.engine import Engine
from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from tests.engine.faulty_family import FaultyFamily
from tests.models.load import MOST_COUNTS, difference, find, load


def random_vae(**config) -> AutoencoderTiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoencoderTiny(**config).eval()


def small_vae(**config) -> AutoencoderTiny:
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return random_vae(**{**widths, **config})


def original_names(vae: AutoencoderTiny, part: str, first: int) -> dict[str, torch.Tensor]:
    """Return a part's weights as TAESD's own release names them, its layers from `first` on."""
    named = {}
    for name, weight in getattr(vae, part).layers.state_dict().items():
        number, _, rest = name.partition(".")
        named[f"{int(number) + first}.{rest}"] = weight.contiguous()
    return named


@torch.inference_mode()
def decoded(vae: AutoencoderTiny, latents):
    """Return the picture of latents (1, C, h, w) as diffusers' pipeline decodes them."""
    image = vae.decode(latents / vae.config.scaling_factor).sample[0]
    return oracle.counts((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())


def draw_one(model, request):
    """Draw a request; return it with the latents (1, C, h, w) that were decoded."""
    groups = []
    family = FaultyFamily(StableDiffusion1(model))
    family.on_decode = lambda latents, dtype: groups.append(latents.clone())
    engine = Engine(family, lanes=2, threads=1)
    try:
        drawn = engine.submit(request).result()
    finally:
        engine.close()
    return drawn, groups[0][:1]


def write_folder(path, vae):
    vae.save_pretrained(path)


def write_file(path, vae):
    save_file({name: w.contiguous() for name, w in vae.state_dict().items()}, path)


def write_decoder(path, vae):
    save_file(original_names(vae, "decoder", 1), path)


def write_prefixed(path, vae):
    decoder = original_names(vae, "decoder", 1)
    save_file({f"taesd_decoder.{name}": weight for name, weight in decoder.items()}, path)


@pytest.mark.parametrize(
    ("name", "write", "make"),
    [
        ("taesd", write_folder, small_vae),
        ("diffusion_pytorch_model.safetensors", write_file, random_vae),
        ("taesd_decoder.safetensors", write_decoder, random_vae),
        ("comfyui.safetensors", write_prefixed, random_vae),
    ],
)
def test_a_tiny_vae_decodes_as_in_diffusers(tiny_model, tmp_path, request_for, name, write, make):
    vae = make()
    write(tmp_path / name, vae)
    files = find(tiny_model, vae=str(tmp_path / name))
    assert find_model.sha256(files) != find_model.sha256(find(tiny_model))
    drawn, latents = draw_one(load(tiny_model, vae=str(tmp_path / name)), request_for())
    assert difference(drawn.image, decoded(vae, latents)) <= MOST_COUNTS
    assert drawn.image.std() > 1
    assert not drawn.decoded_again


def test_a_tiny_vae_that_overflows_in_float16_decodes_again_in_float32(
    tiny_model, tmp_path, request_for
):
    vae = random_vae()
    with torch.no_grad():
        vae.decoder.layers[0].weight *= 2e5  # what it adds up overflows float16
        vae.decoder.layers[-1].weight *= 1e-5
    path = tmp_path / "taesd_decoder.safetensors"
    write_decoder(path, vae)
    model = load(tiny_model, vae=str(path), build=Build("cpu", "float16"))
    drawn, latents = draw_one(model, request_for())
    assert drawn.decoded_again
    assert difference(drawn.image, decoded(vae.half().float(), latents)) <= MOST_COUNTS


def test_an_encoder_alone_is_refused_before_anything_starts(tiny_model, tmp_path):
    path = tmp_path / "taesd_encoder.safetensors"
    save_file(original_names(random_vae(), "encoder", 0), path)
    with pytest.raises(
        ModelError,
        match=r"^model.vae = .*is an encoder of a small VAE .TAESD., without its decoder: must be",
    ):
        find(tiny_model, vae=str(path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"latent_channels": 16}, "its latent_channels is 16, not 4"),
        (
            {
                "decoder_block_out_channels": (8,) * 3,
                "num_decoder_blocks": (1,) * 3,
            },
            "its latents have another size",
        ),
    ],
)
def test_a_tiny_vae_of_other_latents_is_rejected(tiny_model, tmp_path, config, words):
    write_folder(tmp_path / "vae", small_vae(**config))
    with pytest.raises(ModelError, match=f"^model.vae = .*{words}"):
        load(tiny_model, vae=str(tmp_path / "vae"))
