"""A VAE that overflows in float16, against diffusers' AutoencoderKL in float32."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks import oracle
from sdbatch.engine.engine import Engine
from sdbatch.models.build import Build
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.family import StableDiffusion1
from tests.engine.faulty_family import FaultyFamily
from tests.models.load import MOST_COUNTS, difference, load

SEEDS = range(12)
SOME, ALL = 1.7e3, 6e4  # of the first weights: so large that some latents overflow float16, or all
# The first layer's outputs, in hundreds of thousands, pass along the residual path; the group norm
# before the last layer brings them back, so float32 sees nothing unusual.


def overflowing(tiny_model, dtype: str, factor: float) -> loading.Model:
    """Return the tiny model in a type, with a VAE whose activations are larger by `factor`."""
    model = load(tiny_model, Build("cpu", dtype))
    with torch.no_grad():
        for weight in model.vae.decoder.conv_in.parameters():
            weight *= factor
    assert all(weight.isfinite().all() for weight in model.vae.parameters())
    return model


class Drawing:
    """What an engine draws of SEEDS, and the latents that it decoded for it."""

    def __init__(self, model, request_for) -> None:
        self.latents = []
        family = FaultyFamily(StableDiffusion1(model))
        family.on_decode = self._keep
        engine = Engine(family, lanes=8, threads=1)
        try:
            self.futures = [engine.submit(request_for(seed=seed)) for seed in SEEDS]
        finally:
            engine.close()

    def _keep(self, latents, dtype):
        self.latents += [row for row in latents.clone() if row.any()]


@torch.inference_mode()
def decoded_by_diffusers(vae: AutoencoderKL, latents):
    """Return the pictures (H, W, 3) of latents, one by one."""
    for row in latents:
        image = vae.decode(row[None] / vae.config.scaling_factor).sample[0].float()
        yield oracle.counts((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())


def test_pictures_that_overflow_in_float16_are_those_of_diffusers_vae_in_float32(
    tiny_model, request_for
):
    model = overflowing(tiny_model, "float16", SOME)
    drawing = Drawing(model, request_for)
    vae = copy.deepcopy(model.vae).float()
    reference = list(decoded_by_diffusers(vae, drawing.latents))
    again = [future.result() for future in drawing.futures if future.result().decoded_again]
    assert 0 < len(again) < len(SEEDS)
    for drawn in again:
        assert min(difference(drawn.image, picture) for picture in reference) <= MOST_COUNTS
        assert drawn.image.std() > 10  # not one colour
    assert model.vae.dtype == torch.float16


def test_a_vae_that_always_overflows_draws_every_picture_in_float32(tiny_model, request_for):
    drawn = [
        future.result()
        for future in Drawing(overflowing(tiny_model, "float16", ALL), request_for).futures
    ]
    assert all(each.decoded_again for each in drawn)
    assert len({each.image.tobytes() for each in drawn}) == len(SEEDS)


def test_a_vae_that_fits_float16_is_decoded_once(tiny_model, request_for):
    drawing = Drawing(load(tiny_model, Build("cpu", "float16")), request_for)
    assert not any(future.result().decoded_again for future in drawing.futures)
    assert len(drawing.latents) == len(SEEDS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_vae_that_overflows_float32_too_fails_the_rows_and_names_engine_dtype(
    tiny_model, request_for, dtype
):
    for future in Drawing(overflowing(tiny_model, dtype, 1e38), request_for).futures:
        with pytest.raises(
            ArithmeticError, match=r"not finite in float32, the widest engine.dtype"
        ):
            future.result()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_float32_vae_has_the_weights_layout_and_settings_of_the_model_s(
    tiny_model, channels_last
):
    model = load(tiny_model, Build("cpu", "bfloat16", channels_last))
    vae = StableDiffusion1(model)._copy_vae(torch.float32)
    assert dict(vae.config) == dict(model.vae.config)
    weights = vae.state_dict()
    for name, weight in model.vae.state_dict().items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight.float())
        assert weights[name].stride() == weight.stride()
    assert not vae.training
    assert not any(weight.requires_grad for weight in vae.parameters())
