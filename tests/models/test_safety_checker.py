"""The safety checker against diffusers' own, fed by transformers' image processor."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
    cosine_distance,
)
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from sdbatch.engine.limits import DECODE_GROUP as GROUP
from sdbatch.errors import ModelError
from sdbatch.models import safety_checker
from sdbatch.models.safety_checker import CARE, SafetyChecker
from tests.models.load import draw, find, load_with_checker
from tests.sd1 import BUILD

SIDE = 32  # pixels that the tiny checker sees; 224 in the published one
# Pillow resizes in two passes and rounds and cuts off at 0 and 255 between them; torch, which does
# it on the device, only at the end. Single pixels move by up to 13 counts of 255, and scores by
# 0.006 where those of other pictures differ by 0.14 (standard deviation).
TOLERANCE = 0.02
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def pictures(count, height, width, seed=0):
    """Return random pictures (count, height, width, 3), some smooth and some of hard blocks."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        blocks = random.integers(0, 256, (*random.integers(1, 9, 2), 3), dtype=np.uint8)
        how = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[i % 2]
        made.append(np.asarray(Image.fromarray(blocks).resize((width, height), how)))
    return np.stack(made)


def prepared(images):
    """Return what diffusers' pipeline feeds to its checker."""
    crop = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    return processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values


@torch.no_grad()
def cosines(checker, images):
    """Return the cosines of each image to the concepts, and to those of special care."""
    embedding = checker.visual_projection(checker.vision_model(prepared(images))[1])
    concepts, care = checker.concept_embeds, checker.special_care_embeds
    return cosine_distance(embedding, concepts), cosine_distance(embedding, care)


def expected_scores(checker, images):
    """Return the scores that diffusers' forward compares with 0 and discards."""
    concepts, care = cosines(checker, images)
    cared = (care > checker.special_care_embeds_weights).any(1, keepdim=True)
    return concepts - checker.concept_embeds_weights + CARE * cared


def flags(checker, images):
    return np.array(checker(prepared(images), [image.copy() for image in images])[1])


def calibrate(checker, images):
    """Set the thresholds so that some of the images are above them and some are not."""
    concepts, care = cosines(checker, images)
    checker.concept_embeds_weights.copy_(concepts.quantile(0.97, dim=0))
    checker.special_care_embeds_weights.copy_(care.quantile(0.8, dim=0))


def let_half_pass(checker, drawn):
    """Set the thresholds above all scores of the first half of the drawn images."""
    concepts, _ = cosines(checker, np.stack([one.image for one in drawn[: len(drawn) // 2]]))
    checker.concept_embeds_weights.copy_(concepts.amax(0) + CARE + TOLERANCE)


@pytest.fixture
def reference():
    """diffusers' checker in small, with random weights that tell pictures apart."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = CLIPConfig(vision_config=VISION, text_config={}, projection_dim=16)
        checker = StableDiffusionSafetyChecker(config).requires_grad_(False).eval()
        for weight in checker.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        calibrate(checker, pictures(100, 64, 64, seed=1))
    return checker


@pytest.fixture
def checked_model(tiny_model, reference, tmp_path):
    """A copy of the tiny model with a safety checker of its own."""
    folder = tmp_path / "checked"
    shutil.copytree(tiny_model, folder)
    reference.save_pretrained(folder / "safety_checker")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def draw_checked(folder, requests, checker="auto"):
    """Draw the requests with the model in a folder and the safety checker of a job."""
    parts, loaded = load_with_checker(find(folder, checker))
    return draw(parts, requests, loaded)


@pytest.fixture
def requests(request_for):
    prompts = ["a dog", "x", "a house by the sea", "blue", "(", "9 of 10 cats"]
    return [
        request_for(prompt=prompt, seed=i, sampler="euler_a", guidance_scale=30.0)
        for i, prompt in enumerate(prompts)
    ]


def assert_checked(drawn, checker):
    """Assert that images have diffusers' scores and flags, and that only some are flagged."""
    for one in drawn:
        (expected,) = expected_scores(checker, one.image[None])
        scores = torch.tensor(one.nsfw_scores)
        assert scores.shape == (17,)
        assert (scores - expected).abs().max() < TOLERANCE
        assert one.nsfw == (max(one.nsfw_scores) > 0) == flags(checker, one.image[None])[0]
    assert {one.nsfw for one in drawn} == {True, False}


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 120), (16, 24), (32, 32), (80, 360)])
def test_scores_and_flags_are_those_of_diffusers(reference, size):
    images = pictures(20, *size)
    expected = expected_scores(reference, images)
    scores = SafetyChecker(reference).scores(torch.tensor(images))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, scores.round(decimals=3))
    assert (scores - expected).abs().max() < TOLERANCE
    flagged = torch.tensor(flags(reference, images))
    sure = expected.max(1)[0].abs() > TOLERANCE
    assert torch.equal((scores > 0).any(1)[sure], flagged[sure])
    assert 0 < flagged[sure].sum() < sure.sum() > 10


def test_a_concept_of_special_care_lowers_every_threshold(reference):
    images = pictures(8, SIDE, SIDE)  # of the checker's own size: nothing is resized
    scores = []
    for threshold in (1.0, -1.0):  # of a cosine: never, and always
        reference.special_care_embeds_weights.fill_(threshold)
        scores.append(SafetyChecker(reference).scores(torch.tensor(images)))
        torch.testing.assert_close(
            scores[-1], expected_scores(reference, images), atol=0.00051, rtol=0
        )
    torch.testing.assert_close(scores[1] - scores[0], torch.full((8, 17), CARE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_an_image_do_not_depend_on_the_others_in_its_group(reference, dtype):
    checker = SafetyChecker(reference).to("cpu", getattr(torch, dtype))
    images = torch.tensor(pictures(4 * GROUP, 64, 96))
    first = torch.cat([checker.scores(group) for group in images.split(GROUP)])
    for seed in range(5):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        other = torch.cat([checker.scores(group) for group in images[order].split(GROUP)])
        assert torch.equal(other, first[order])
    padded = torch.cat([images[:1], torch.zeros_like(images[1:GROUP])])
    assert torch.equal(checker.scores(padded)[0], first[0])


def test_scores_in_bfloat16_are_near_those_in_float32(reference):
    images = torch.tensor(pictures(20, 64, 64))
    exact = SafetyChecker(reference).scores(images)
    rounded = SafetyChecker(reference).to("cpu", torch.bfloat16).scores(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05  # bfloat16 has 8 bits


def test_a_model_with_a_checker_in_its_folder_is_checked_by_default(
    tiny_model, checked_model, reference, requests
):
    plain = draw_checked(tiny_model, requests)
    assert {(one.nsfw, one.nsfw_scores) for one in plain} == {(None, None)}
    let_half_pass(reference, plain)
    reference.save_pretrained(checked_model / "safety_checker")
    drawn = draw_checked(checked_model, requests)
    assert_checked(drawn, reference)
    for one, two in zip(drawn, plain, strict=True):  # flagged or not, all pictures stay
        assert np.array_equal(one.image, two.image)


def test_checker_none_turns_the_models_own_off(checked_model, requests):
    assert safety_checker.load(find(checked_model, "none"), BUILD) is None
    drawn = draw_checked(checked_model, requests[:2], "none")
    assert {(one.nsfw, one.nsfw_scores) for one in drawn} == {(None, None)}


def test_a_checker_from_a_folder_replaces_the_models_own(
    tiny_model, checked_model, reference, requests, tmp_path
):
    let_half_pass(reference, draw_checked(tiny_model, requests))
    reference.save_pretrained(tmp_path / "other")
    for folder in (tiny_model, checked_model):
        assert_checked(draw_checked(folder, requests, str(tmp_path / "other")), reference)


def test_images_that_are_not_square_are_checked(checked_model, requests, reference):
    wide = [request.updated(height=64, width=120) for request in requests]
    for one in draw_checked(checked_model, wide):
        (expected,) = expected_scores(reference, one.image[None])
        assert (torch.tensor(one.nsfw_scores) - expected).abs().max() < TOLERANCE


def test_a_checker_that_exists_only_in_the_models_variant_is_loaded(checked_model):
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        (weights,) = (checked_model / part).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    _, checker = load_with_checker(find(checked_model))
    assert checker is not None


def test_a_checker_of_another_shape_is_rejected_in_one_line(checked_model):
    config = json.loads((checked_model / "safety_checker" / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (checked_model / "safety_checker" / "config.json").write_text(json.dumps(config))
    files = find(checked_model)
    reason = r"^safety.checker = .*checked.*cannot be loaded"
    with pytest.raises(ModelError, match=reason) as rejected:
        safety_checker.load(files, BUILD)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("name", ["concept_embeds_weights", "special_care_embeds_weights"])
def test_a_checker_with_weights_that_are_not_finite_is_rejected_by_their_name(
    checked_model, reference, name
):
    getattr(reference, name)[2] = math.nan
    reference.save_pretrained(checked_model / "safety_checker")
    with pytest.raises(ModelError, match=rf"^safety.checker = .*the checker.{name} holds values"):
        safety_checker.load(find(checked_model), BUILD)
