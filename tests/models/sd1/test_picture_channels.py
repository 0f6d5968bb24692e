"""Models whose UNet sees a picture draw what diffusers' pipelines for inpainting and editing draw.

diffusers samples a picture's latents with the noise's generator, and rows take their mean: so the
pipelines take the mean here too (oracle.posterior_means).
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL import Image

from benchmarks import oracle
from sdbatch.engine.engine import Engine
from sdbatch.engine.places import differences
from sdbatch.errors import JobError
from sdbatch.models.build import Build
from sdbatch.models.identify import EDITING, INPAINTING
from sdbatch.models.sd1.family import CHANNELS, StableDiffusion1
from sdbatch.resolve import find_model, load_engine, resolve
from tests.models.load import assert_as_diffusers, difference, draw, load

SAMPLERS = ("ddim", "euler_a", "dpmpp_2m_karras", "heun", "dpmpp_sde", "unipc")
HEIGHT, WIDTH = 64, 72


def picture(seed=0, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mask_of(seed=0, height=HEIGHT, width=WIDTH):
    """Return a mask of every grey, so that its rounding counts."""
    return np.random.default_rng(seed + 100).integers(0, 256, (height, width), np.uint8)


def test_a_mask_of_every_grey_is_one_in_some_latents_and_zero_in_others():
    drawn = mask_of()[::8, ::8] >= 128
    assert 0.3 < drawn.mean() < 0.7


@pytest.fixture(scope="session")
def painter(folders_by_use):
    return load(folders_by_use[INPAINTING])


@pytest.fixture(scope="session")
def editor(folders_by_use):
    return load(folders_by_use[EDITING])


@pytest.fixture
def means():
    """Have diffusers take the mean of a picture's latents, and leave the generator as it is."""
    with oracle.posterior_means():
        yield


@pytest.fixture
def painted(request_for):
    """Build a request for inpainting."""

    def build(mask=True, **values):
        inputs = {"image": picture()} | ({"mask": mask_of()} if mask else {})
        values = {"height": HEIGHT, "width": WIDTH, "inputs": inputs, "strength": 1.0, **values}
        return request_for(**values)

    return build


@pytest.fixture
def edited(request_for):
    """Build a request for an edit."""

    def build(seed=0, **values):
        inputs = {"image": picture(seed)}
        values = {"height": HEIGHT, "width": WIDTH, "inputs": inputs, "seed": seed, **values}
        return request_for(prompt="make it red", negative_prompt="blurry", **values)

    return build


def as_given(request):
    """Return a request's pictures as diffusers' inpainting takes them."""
    mask = request.inputs.get("mask", np.full((request.height, request.width), 255, np.uint8))
    image = request.inputs.get("image", np.zeros((request.height, request.width, 3), np.uint8))
    return {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask)}


def assert_as_inpainting(model, request, strength):
    pipe = oracle.pipeline(model, StableDiffusionInpaintPipeline)
    (drawn,) = draw(model, [request])
    given = {**as_given(request), "strength": strength}
    assert_as_diffusers(drawn, pipe, request, model.scheduler_config, **given)
    return drawn


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_is_that_of_diffusers(painter, painted, means, sampler, strength):
    request = painted(sampler=sampler, strength=strength)
    drawn = assert_as_inpainting(painter, request, strength)
    other = painted(sampler=sampler, strength=strength, inputs={"image": picture()})
    assert difference(draw(painter, [other])[0].image, drawn.image) > 1  # the mask counts


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_row_without_a_mask_is_drawn_as_with_a_mask_of_all_white(
    painter, painted, means, strength
):
    assert_as_inpainting(painter, painted(mask=False, strength=strength), strength)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_row_without_a_picture_is_drawn_as_with_a_mask_of_all_white(
    painter, request_for, means, guidance_scale
):
    # whatever its strength
    request = request_for(height=HEIGHT, width=WIDTH, guidance_scale=guidance_scale)
    assert_as_inpainting(painter, request, 1.0)


def test_hires_fix_draws_its_second_pass_with_a_mask_of_all_white(painter, request_for, means):
    request = request_for(hires_scale=1.5, hires_upscaler="lanczos", hires_strength=0.5)
    pipe = oracle.pipeline(painter, StableDiffusionInpaintPipeline)
    first = request.model_copy(update={"hires_scale": 1.0})
    small = Image.fromarray(draw(painter, [first])[0].image)
    second = request.enlarged()
    large = np.asarray(small.resize((second.width, second.height), Image.Resampling.LANCZOS))
    # all of its steps are drawn, the second half of a schedule of twice as many
    second = second.model_copy(update={"inputs": {"image": large}, "num_inference_steps": 12})
    given = {**as_given(second), "strength": 0.5}
    (drawn,) = draw(painter, [request])
    assert_as_diffusers(drawn, pipe, second, painter.scheduler_config, **given)
    latent = request.model_copy(update={"hires_upscaler": "latent"})
    assert draw(painter, [latent])[0].image.shape == drawn.image.shape


def test_the_latents_under_a_mask_are_not_filled_but_as_a1111_does(painter, painted):
    engine = Engine(StableDiffusion1(painter), lanes=4, threads=1)
    for fill in ("noise", "nothing"):
        with pytest.raises(ValueError, match=rf"mask_fill = '{fill}': must be original or fill"):
            engine.check(painted(mask_fill=fill))
        engine.check(painted(mask_fill=fill, compat="a1111"))
    engine.check(painted(mask_fill="fill"))
    engine.close()


def test_inpainting_as_a1111_does_keeps_the_latents_outside_of_the_mask(painter, painted):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, : WIDTH // 2] = 255
    inputs = {"image": picture(), "mask": mask}
    family = StableDiffusion1(painter)
    originals = []
    for compat in ("diffusers", "a1111"):
        request = painted(compat=compat, strength=0.5, inputs=inputs)
        reading = family.read(request)
        pixels = torch.stack([torch.tensor(each) for each in reading.pictures.values()])
        with torch.inference_mode():
            encoded = dict(zip(reading.pictures, family.encode(pixels), strict=True))
            originals.append(family.with_pictures(request, reading, encoded).original)
    assert originals[0].mask is None
    assert originals[1].mask.mean() == pytest.approx(0.5, abs=0.1)


def assert_as_editing(model, request, **given):
    pipe = oracle.pipeline(model, StableDiffusionInstructPix2PixPipeline)
    (drawn,) = draw(model, [request])
    given = {
        "image": Image.fromarray(request.inputs["image"]),
        "image_guidance_scale": request.image_guidance_scale,
        **given,
    }
    assert_as_diffusers(drawn, pipe, request, model.scheduler_config, **given)
    return drawn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_is_that_of_diffusers(editor, edited, sampler):
    request = edited(sampler=sampler)
    drawn = assert_as_editing(editor, request)
    other = edited(sampler=sampler, inputs={"image": picture(1)})
    assert difference(draw(editor, [other])[0].image, drawn.image) > 1  # the picture counts


@pytest.mark.parametrize(
    "values",
    [
        {"guidance_scale": 1.0},
        {"image_guidance_scale": 1.0},
        {"image_guidance_scale": 3.0, "guidance_scale": 2.0},
    ],
    ids=str,
)
def test_an_edit_is_guided_by_its_text_and_by_its_picture(editor, edited, values):
    drawn = assert_as_editing(editor, edited(**values))
    assert difference(drawn.image, draw(editor, [edited()])[0].image) > 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inputs": {}}, "image = none: must be a picture, as this model edits pictures"),
        (
            {"inputs": {"image": picture(), "mask": mask_of()}},
            "mask_image = a mask: must be none, as this model edits whole pictures",
        ),
        ({"hires_scale": 2.0}, "hires_scale = 2: must be 1, as this model edits pictures"),
        ({"strength": 0.5}, r"strength = 0.5: must be 0.8, its default, as .* compat to a1111"),
        ({"sample_posterior": True}, "sample_posterior = True: must be False, its default"),
    ],
)
def test_what_an_edit_does_not_have_is_refused(editor, edited, values, words):
    engine = Engine(StableDiffusion1(editor), lanes=4, threads=1)
    with pytest.raises(ValueError, match=words):
        engine.submit(edited(**values)).result()
    engine.close()


@torch.inference_mode()
def test_an_edit_as_a1111_does_begins_with_the_picture(editor, edited):
    request = edited(sampler="ddim", strength=1.0, compat="a1111")
    moments = StableDiffusion1(editor).encode(torch.tensor(request.inputs["image"])[None])
    scheduler = DDIMScheduler.from_config(editor.scheduler_config)
    scheduler.set_timesteps(request.num_inference_steps)
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    scaled = moments[:, :4] * editor.vae.config.scaling_factor
    latents = scheduler.add_noise(scaled, noise, scheduler.timesteps[:1])
    drawn = assert_as_editing(editor, request, latents=latents)
    assert difference(drawn.image, draw(editor, [edited(sampler="ddim")])[0].image) > 1


def test_an_edit_as_a1111_does_has_a_strength_and_a_mask(editor, edited):
    def image(**values):
        (drawn,) = draw(editor, [edited(compat="a1111", num_inference_steps=12, **values)])
        return drawn.image

    weak, strong = image(strength=0.1), image(strength=0.9)
    assert difference(weak, strong) > 1
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    inputs = {"image": picture(0), "mask": mask}
    nothing_drawn = image(strength=0.9, inputs=inputs)
    family = StableDiffusion1(editor)
    with torch.inference_mode():
        moments = family.encode(torch.tensor(picture(0))[None])
        latents = moments[:, :4] * editor.vae.config.scaling_factor
        decoded = family.decode(latents, torch.float32).pixels[0].numpy()
    assert difference(nothing_drawn, decoded) <= 1


def test_other_models_have_no_guidance_by_a_picture(painter, model, request_for):
    for each in (painter, model):
        engine = Engine(StableDiffusion1(each), lanes=4, threads=1)
        with pytest.raises(
            ValueError, match=r"image_guidance_scale = 2.0: must be 1.5, this model"
        ):
            engine.submit(request_for(image_guidance_scale=2.0)).result()
        engine.close()


def test_a_tiny_vae_does_not_edit(folders_by_use, edited, tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    family = StableDiffusion1(load(folders_by_use[EDITING], vae=str(tmp_path / "taesd")))
    with pytest.raises(ValueError, match=r"tiny VAE's latents have another scale.*model.vae"):
        family.read(edited())


BUILDS = {
    "plain": Build("cpu", "float32"),
    "rewritten": Build("cpu", "bfloat16", rewrites=("phase_upsample", "text_kv")),
}


@pytest.mark.parametrize(
    "build",
    [*BUILDS.values(), Build("cpu", "float32", rewrites=("shared_prefix",))],
    ids=[*BUILDS, "shared_prefix"],
)
def test_a_painted_row_does_not_depend_on_its_neighbours(
    folders_by_use, painted, request_for, build
):
    model = load(folders_by_use[INPAINTING], build)
    size = {"height": HEIGHT, "width": WIDTH}
    requests = [
        painted(seed=1),
        painted(seed=2, strength=0.5, cache_interval=2),
        painted(seed=3, mask=False, sampler="euler_a"),
        request_for(seed=4, guidance_scale=1.0, **size),
        request_for(seed=5, **size),
        painted(seed=6, strength=0.5, guidance_stop=0.5, sample_posterior=True, compat="a1111"),
    ]
    assert_own_bits(model, requests)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_an_edited_row_does_not_depend_on_its_neighbours(folders_by_use, edited, build):
    model = load(folders_by_use[EDITING], build)
    requests = [
        edited(seed=1),
        edited(seed=2, cache_interval=2),
        edited(seed=3, guidance_scale=1.0),
        edited(seed=4, guidance_stop=0.5, image_guidance_scale=2.0),
        edited(seed=5, sampler="euler_a", guidance_rescale=0.5),
        edited(seed=6, compat="a1111", strength=0.6),
    ]
    assert_own_bits(model, requests)


def assert_own_bits(model, requests):
    requests = [each.model_copy(update={"num_inference_steps": 4}) for each in requests]
    for one, alone in zip(draw(model, requests[::-1])[::-1], requests, strict=True):
        assert np.array_equal(one.image, draw(model, [alone])[0].image)


def test_places_of_a_call_are_tried_with_all_channels(painter, editor, request_for, edited):
    for model, request in ((painter, request_for()), (editor, edited())):
        assert differences(StableDiffusion1(model), request, 6, 2) == []


@torch.inference_mode()
def test_only_the_third_lane_of_an_edit_sees_no_picture(editor, edited):
    family = StableDiffusion1(editor)
    request = edited()
    reading = family.read(request)
    encoded = {"image": family.encode(torch.tensor(request.inputs["image"])[None])[0]}
    lanes = family.embed([family.with_pictures(request, reading, encoded)], [])
    assert [bool(lane[CHANNELS].any()) for lane in lanes] == [True, True, False]
    assert lanes[0][CHANNELS].shape == (1, 4, HEIGHT // 8, WIDTH // 8)


def test_an_engine_for_edits_warms_up_without_a_picture_of_the_job(
    folders_by_use, make_job, edited
):
    job = make_job(model={"path": str(folders_by_use[EDITING])})
    files, job = find_model(job)
    resolved = resolve(job, files, 0, None)
    example = edited(inputs={})
    engine = load_engine(files, resolved.engine, example, must_draw=True)
    assert engine.submit(edited(seed=9)).result().image.std() > 1
    engine.close()


def test_lanes_that_are_too_few_for_an_edit_are_refused(folders_by_use, make_job, edited):
    for use, least in ((INPAINTING, 2), (EDITING, 3)):
        job = make_job(model={"path": str(folders_by_use[use])}, engine={"lanes": 2})
        files, job = find_model(job)
        if least == 2:
            assert resolve(job, files, 0, None).engine.most_lanes == 2
            continue
        with pytest.raises(JobError, match=r"engine.lanes = 2: must be at least 3, the lanes of"):
            resolve(job, files, 0, None)
        large = make_job(model={"path": str(folders_by_use[use])}, sampling={"height": 4096})
        assert resolve(large, *find_model(large)[:1], 0, None).engine.most_lanes == 3
    # and an engine whose lanes are halved for a large image keeps as many
    engine = Engine(StableDiffusion1(load(folders_by_use[EDITING])), lanes=3, threads=1, pixels=1)
    assert engine.submit(edited()).result().lanes == 3
    engine.close()
