"""Requests as images to draw: what the job, the registries and the sampling keys decide."""

from dataclasses import replace

import pytest
import yaml

from sdbatch.job import Limits, Sampling, parse
from sdbatch.output.image_file import Encoding
from sdbatch.registry import IMAGE_FORMATS
from sdbatch.sampling import KEYS, UPSCALERS
from sdbatch.serve import a1111_bodies as a1111
from sdbatch.serve import a1111_requests, requests
from sdbatch.serve.requests import Generation, ServedModel
from tests.serve.conftest import ENCODING, job_of

VALUES = {
    "num_inference_steps": 7,
    "guidance_scale": 3.5,
    "height": 72,
    "width": 80,
    "eta": 0.5,
    "strength": 0.3,
    "mask_blur": 9,
    "image_guidance_scale": 2.5,
    "variation_seed": 12,
    "variation_strength": 0.4,
    "hires_scale": 1.5,
    "hires_steps": 5,
    "hires_upscaler": "latent_bicubic",
}
A1111 = {name: key.a1111_parameter for name, key in KEYS.items() if key.a1111_parameter}


def model_of(image_format="png", quality=None):
    encoding = Encoding(image_format, quality, ENCODING.model, ENCODING.model_hash, "sdbatch test")
    return ServedModel(job_of(), "tiny", encoding)


def read(**body):
    model = model_of()
    kind = requests.body_with_defaults(Generation, model.job)
    return requests.from_generation(kind(prompt="a dog", **body), model, Limits())


def test_every_sampling_key_with_an_a1111_parameter_reaches_the_engine():
    values = {**Sampling().model_dump(), **VALUES}
    fields = {parameter: values[name] for name, parameter in A1111.items()}
    fields |= {"hr_upscaler": "Latent (bicubic)", "sampler_name": "DDIM", "enable_hr": True}
    reached = set()
    for kind, read_body in (
        (a1111.Txt2Img, a1111_requests.from_txt2img),
        (a1111.Img2Img, a1111_requests.from_img2img),
    ):
        given = {**fields, "init_images": ["eA=="], "mask": "eA=="}
        body = kind(**{name: given[name] for name in given if name in kind.model_fields})
        first = read_body(body, model_of(), Limits()).first
        reached |= {name for name in A1111 if getattr(first, name) == values[name]}
    assert reached == A1111.keys()


@pytest.mark.parametrize("name", [*a1111.SHARED_KEYS, *a1111.IMG2IMG_KEYS])
def test_a1111_parameter_has_the_range_of_its_sampling_key(name):
    for value in (-1, 1_000_000):
        for kind, key in ((Sampling, name), (a1111.Img2Img, A1111[name])):
            with pytest.raises(ValueError, match=key):
                kind(**{key: value})


def test_every_upscaler_has_a_name_in_a1111s_api():
    assert tuple(a1111.UPSCALERS) == UPSCALERS


def test_eta_of_the_override_settings_is_used_unless_the_request_has_eta():
    settings = {"eta_ddim": 0.25}
    for fields, eta in (({}, 0.25), ({"eta": 0.5}, 0.5), ({"eta": 0.0}, 0.0)):
        body = a1111.Txt2Img(sampler_name="DDIM", override_settings=settings, **fields)
        assert a1111_requests.from_txt2img(body, model_of(), Limits()).first.eta == eta


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_image_format_of_the_registry_can_be_requested(name):
    image_format = IMAGE_FORMATS[name]
    [draw_request] = read(output_format=image_format.api_name).draw_requests
    assert draw_request.encoding.image_format == name
    assert draw_request.encoding.quality == image_format.quality
    for samples_format in (name, image_format.api_name):
        body = a1111.Txt2Img(override_settings={"samples_format": samples_format})
        [draw_request] = a1111_requests.from_txt2img(body, model_of(), Limits()).draw_requests
        assert draw_request.encoding.image_format == name


@pytest.mark.parametrize(
    ("job_quality", "requested", "quality"),
    [(None, None, 95), (80, None, 80), (80, 60, 60), (None, 0, 1)],
)
def test_quality_is_the_requests_then_the_jobs_then_the_formats(job_quality, requested, quality):
    assert model_of("jpg", job_quality).encoding_for("jpg", requested).quality == quality
    assert model_of("jpg", job_quality).encoding_for("png").quality is None


def test_job_file_describes_the_images_of_a_request():
    image_request = read(seed=5, n=2, output_format="jpeg", output_compression=70, width=72)
    job = parse(yaml.safe_load(requests.job_file(image_request, job_of())))
    assert job.prompts.rows == [{"prompt": "a dog", "seed": 5}]
    assert job.prompts.images_per_row == 2
    assert (job.output.image_format, job.output.quality) == ("jpg", 70)
    assert (job.sampling.width, job.sampling.num_inference_steps) == (72, 4)
    assert job.engine == job_of().engine


def test_job_file_of_a_lossless_image_has_no_quality():
    assert parse(yaml.safe_load(requests.job_file(read(), job_of()))).output.quality is None


def test_job_file_of_a_png_has_the_compression_of_the_served_job():
    encoding = replace(ENCODING, compression=1)
    kind = requests.body_with_defaults(Generation, job_of())
    served = ServedModel(job_of(), "tiny", encoding)
    drawn = requests.from_generation(kind(prompt="a dog"), served, Limits())
    assert parse(yaml.safe_load(requests.job_file(drawn, job_of()))).output.compression == 1
