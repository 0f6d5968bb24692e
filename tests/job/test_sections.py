"""The job file's sections: the values of each key, keys that exclude each other, defaults."""

import re

import pytest
from pydantic import ValidationError

from sdbatch.errors import JobError
from sdbatch.job import parse
from tests.job.test_job import SECTIONS, WHOLE, changed


@pytest.mark.parametrize(
    ("section", "key", "value", "must"),
    [
        ("prompts", "path", 3, "text or a list"),
        ("prompts", "columns", "caption", "a section of keys"),
        ("prompts", "columns", ["caption"], "a section of keys"),
        ("prompts", "keep", "breed", "a list"),
        ("prompts", "images_per_row", 1.5, "a whole number"),
        ("prompts", "limit", "10", "a whole number"),
        ("model", "revision", 7, "text"),
        ("sampling", "sampler", "dpm", "a sampler. Did you mean 'dpm2'. Known: ddim, pndm"),
        ("sampling", "sampler", "ddim_karras", "a sampler. Did you mean"),
        ("sampling", "guidance_rescale", 1.5, "less than or equal to 1"),
        ("sampling", "prompt_weights", "yes", "true or false"),
        ("engine", "compile", "yes", "'auto' or true or false"),
        ("model", "loras", "l.safetensors", "a list"),
        ("model", "prediction_type", "v", "'epsilon' or 'v_prediction'"),
        ("safety", "policy", "hide", "'flag', 'blank' or 'drop'"),
        ("sampling", "num_inference_steps", "25", "a whole number"),
        ("sampling", "guidance_scale", "7.5", "a number"),
        ("sampling", "guidance_scale", float("nan"), "a number"),
        ("sampling", "negative_prompt", 7, "text"),
        ("sampling", "width", "512", "a whole number"),
        ("sampling", "seed", True, "a whole number"),
        ("engine", "device", "gpu", "'auto', 'cpu' or 'cuda'"),
        ("engine", "lanes", "many", "'auto' or a whole number"),
        ("engine", "threads", None, "a whole number"),
        ("cluster", "actors", 1.5, "'auto' or a whole number"),
        ("cluster", "gpus_per_actor", "one", "a number"),
        ("cluster", "address", 10001, "text"),
        ("output", "path", None, "text"),
        ("output", "format", "tar", "'parquet' or 'webdataset'"),
        ("output", "images_per_shard", "all", "'auto' or a whole number"),
    ],
)
def test_value_of_another_type_is_rejected_with_the_expected_type(section, key, value, must):
    with pytest.raises(JobError, match=f"^{section}.{key} = .*: must be {must}"):
        parse(changed(section, **{key: value}))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [3, None, [1]])
def test_section_that_is_not_a_mapping_is_rejected(section, value):
    with pytest.raises(JobError, match=f"^{section} = .*: must be a section of keys"):
        parse({**WHOLE, section: value})


@pytest.mark.parametrize(
    ("section", "key", "value", "must"),
    [
        ("prompts", "images_per_row", 0, "greater than or equal to 1"),
        ("prompts", "limit", 0, "greater than or equal to 1"),
        ("sampling", "num_inference_steps", 1000, "less than or equal to 999"),
        ("sampling", "guidance_scale", 0.5, "greater than or equal to 1"),
        ("sampling", "height", 0, "greater than or equal to 8"),
        ("sampling", "height", 4104, "less than or equal to 4096"),
        ("sampling", "seed", -1, "greater than or equal to 0"),
        ("sampling", "seed", 2**63, f"less than or equal to {2**63 - 1}"),
        ("engine", "lanes", 1, "'auto' or greater than or equal to 2"),
        ("cluster", "actors", 0, "'auto' or greater than or equal to 1"),
        ("cluster", "gpus_per_actor", 0, "greater than 0"),
        ("output", "images_per_shard", 0, "'auto' or greater than or equal to 1"),
        ("output", "quality", 101, "less than or equal to 100"),
        ("output", "compression", 10, "less than or equal to 9"),
    ],
)
def test_value_out_of_range_is_rejected_with_the_bound(section, key, value, must):
    with pytest.raises(JobError, match=f"^{section}.{key} = {value}: must be {must}"):
        parse(changed(section, **{key: value}))


@pytest.mark.parametrize(("side", "nearest"), [(513, 512), (509, 512), (1, 8), (767, 768)])
def test_side_that_is_not_a_multiple_of_8_is_rejected_with_the_nearest_multiple(side, nearest):
    words = f"^sampling.width = {side}: must be a multiple of 8.* Nearest: {nearest}"
    with pytest.raises(JobError, match=words):
        parse(changed("sampling", width=side))


@pytest.mark.parametrize("value", ["auto", 4])
def test_lanes_actors_and_images_per_shard_accept_auto_or_a_number(value):
    sections = {"engine": "lanes", "cluster": "actors", "output": "images_per_shard"}
    for section, key in sections.items():
        job = parse(changed(section, **{key: value}))
        assert getattr(getattr(job, section), key) == value


def test_unknown_keys_of_sections_in_a_list_are_named_by_their_index():
    loras = [{"path": "a.safetensors"}, {"pth": "b.safetensors"}]
    with pytest.raises(JobError, match=r"^model.loras.1.pth: unknown key. Did you mean .*1.path"):
        parse(changed("model", loras=[*loras[:1], {"path": "b", **loras[1]}]))
    with pytest.raises(JobError, match=r"^model.loras.1.path = nothing: must be given"):
        parse(changed("model", loras=[*loras[:1], {"weight": 1}]))


@pytest.mark.parametrize("name", ["", "a:b", "a,b", "<a>", " a", "a "])
def test_a_name_that_no_prompt_could_hold_is_rejected(name):
    with pytest.raises(JobError, match=r"^model.loras.0.name = .*: must be "):
        parse(changed("model", loras=[{"path": "a.safetensors", "name": name}]))


def test_a_name_of_two_loras_is_rejected():
    loras = [{"path": f"{name}.safetensors", "name": "ink"} for name in "ab"]
    with pytest.raises(JobError, match=r"^model.loras.0.name = 'ink': must be used once"):
        parse(changed("model", loras=loras))


@pytest.mark.parametrize(
    ("loras", "words"),
    [
        ("inc", "sampling.loras = 'inc': 'inc' is not the name of a LoRA. Did you mean 'ink'?"),
        ("ink:x", "sampling.loras = 'ink:x': must be NAME or NAME:WEIGHT, with a weight from -10"),
        (["ink"], "sampling.loras = ['ink']: must be text"),
        ("ink," * 300, "must be "),
    ],
)
def test_loras_of_the_job_that_no_row_could_draw_are_rejected(loras, words):
    named = changed("model", loras=[{"path": "a.safetensors", "name": "ink"}])
    with pytest.raises(JobError, match=f"^{re.escape(words)}" if "ink" in words else words):
        parse({**named, "sampling": {"loras": loras}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eta": 0.5}, "eta = 0.5: must be 0, dpmpp_2m has no eta"),
        (
            {"guidance_start": 0.8, "guidance_stop": 0.2},
            "guidance_start = 0.8: must not be after guidance_stop, 0.2",
        ),
        (
            {"hires_scale": 8, "width": 2048},
            "hires_scale = 8: must leave sides of at most 8192 pixels, so be at most 4 with a side "
            "of 2048",
        ),
        (
            {"guidance_sigma_low": 3, "guidance_sigma_high": 0.5},
            "guidance_sigma_low = 3: must not be above guidance_sigma_high, 0.5",
        ),
    ],
)
def test_contradictory_sampling_values_are_rejected(keys, words):
    with pytest.raises(JobError, match=f"^sampling.{words}"):
        parse(changed("sampling", **keys))


def test_quality_is_rejected_for_png_with_the_way_out():
    with pytest.raises(JobError, match=r"^output.quality = 90: png is lossless. Leave it out"):
        parse(changed("output", image_format="png", quality=90))


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_compression_is_rejected_for_a_lossy_format_with_the_way_out(image_format):
    words = rf"^output.compression = 3: is for png, and image_format is {image_format}. Leave it"
    with pytest.raises(JobError, match=words):
        parse(changed("output", image_format=image_format, compression=3))


@pytest.mark.parametrize(("image_format", "quality"), [("jpg", 95), ("webp", 90)])
def test_each_lossy_format_has_a_default_quality(image_format, quality):
    assert parse(changed("output", image_format=image_format)).output.encoder_quality == quality


@pytest.mark.parametrize("missing", ["prompts", "model", "output"])
def test_section_without_a_default_must_be_given(missing):
    with pytest.raises(JobError, match=f"^{missing} = nothing: must be given"):
        parse({name: section for name, section in WHOLE.items() if name != missing})


def test_model_is_the_same_as_a_string_and_as_a_section():
    assert parse({**WHOLE, "model": "builtin:shapes"}) == parse(WHOLE)


def test_model_name_has_no_folders():
    assert parse(WHOLE).model.name == "builtin:shapes"
    assert parse(changed("model", path="/home/me/my-model/")).model.name == "my-model"


def test_title_is_the_jobs_name_or_else_the_outputs():
    assert parse({**WHOLE, "name": "hounds"}).title == "hounds"
    assert parse(changed("output", path="s3://bucket/dogs/")).title == "dogs"


def test_job_cannot_be_changed_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        parse(WHOLE).sampling.seed = 3


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        ({"keep_s": 10}, "serve.keep_s = 10: must be at least timeout_s, 300"),
        ({"keep": "s3://"}, "serve.keep = 's3://': must be a folder, such as out/dogs, or a URL"),
        ({"queue": 0}, "serve.queue = 0: must be greater than or equal to 1"),
        ({"timeout_s": 0}, "serve.timeout_s = 0: must be greater than 0"),
        ({"limits": {"image": 3}}, "serve.limits.image: unknown key. Did you mean"),
        ({"limits": {"images": 101}}, "serve.limits.images = 101: must be less than or equal"),
        ({"max_replicas": "many"}, "serve.max_replicas = 'many': must be 'auto' or a whole number"),
    ],
)
def test_impossible_serve_settings_are_rejected(serve, words):
    whole = {"prompts": {"path": "p"}, "model": "m", "output": {"path": "o"}}
    with pytest.raises(JobError, match=f"^{words}"):
        parse({**whole, "serve": serve})
