"""The job file: what is refused and in which words, overrides, the JSON Schema."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from sdbatch.errors import JobError
from sdbatch.job import Job, json_schema, load, parse

ROOT = Path(__file__).parents[1]
WHOLE = {
    "prompts": {"path": "prompts.csv"},
    "model": {"path": "builtin:shapes"},
    "output": {"path": "out/dogs"},
}
EVERY_KEY = yaml.safe_load("""
name: dogs
prompts:
  path: [a.csv, b.csv]
  columns: {id: i, prompt: caption, seed: s}
  keep: [breed]
  images_per_row: 4
  limit: 1000
model: {path: m, revision: main, variant: fp16, config: c, ema: false, zero_snr: true,
        prediction_type: v_prediction, vae: v, loras: [{path: l.safetensors, weight: 0.5}],
        embeddings: [{path: e.pt, token: <e>}], sha256: "0"}
sampling: {sampler: ddim, num_inference_steps: 50, guidance_scale: 7, guidance_rescale: 0.7,
           guidance_start: 0.1, guidance_stop: 0.9, negative_prompt: blurry, eta: 0.5,
           height: 768, width: 512, seed: 9223372036854775807, clip_skip: 1,
           prompt_weights: true, chunk_prompts: true}
engine: {device: cpu, dtype: float32, lanes: 8, threads: 2, channels_last: true, compile: true}
cluster: {actors: 2, gpus_per_actor: 0.5, cpus_per_actor: 2, address: auto}
output: {path: out, format: webdataset, image_format: webp, quality: 80, images_per_shard: 100}
safety: {checker: none, policy: drop}
""")
SECTIONS = ("prompts", "model", "sampling", "engine", "cluster", "output", "safety")


def changed(section, **keys):
    """Return a whole job's values with `keys` of `section` changed."""
    return {**WHOLE, section: {**WHOLE.get(section, {}), **keys}}


def write(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("prompts", "colums", "columns"),
        ("model", "revison", "revision"),
        ("sampling", "guidence_scale", "guidance_scale"),
        ("engine", "lane", "lanes"),
        ("cluster", "actor", "actors"),
        ("output", "image_fromat", "image_format"),
        ("safety", "polcy", "policy"),
    ],
)
def test_unknown_key_of_a_section_is_refused_with_the_one_meant(section, key, meant):
    words = f"^{section}.{key}: unknown key. Did you mean '{section}.{meant}'"
    with pytest.raises(JobError, match=words):
        parse(changed(section, **{key: 1}))


def test_unknown_section_is_refused_with_the_one_meant():
    with pytest.raises(JobError, match=r"^samplng: unknown key. Did you mean 'sampling'"):
        parse({**WHOLE, "samplng": {"seed": 1}})


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_of_a_section_lists_the_known_ones_when_none_is_close(section):
    known = ", ".join(Job.model_fields[section].annotation.model_fields)
    with pytest.raises(JobError, match=f"^{section}.zzz: unknown key. Known: {known}."):
        parse(changed(section, zzz=1))


def test_unknown_section_lists_the_known_ones_when_none_is_close():
    known = "name, prompts, model, sampling, engine, cluster, output"
    with pytest.raises(JobError, match=f"^zzz: unknown key. Known: {known}."):
        parse({**WHOLE, "zzz": 1})


@pytest.mark.parametrize("key", ["sampling.seed", "sampling.sede.x", "int", "a.b"])
def test_unknown_key_is_named_when_it_has_dots_or_the_name_of_a_type(key):
    with pytest.raises(JobError, match=f"^{key}: unknown key"):
        parse({**WHOLE, key: 1})


def test_unknown_name_in_columns_is_refused_with_the_names_there_are():
    with pytest.raises(JobError, match=r"prompts.columns.promt = .*'prompt', 'negative_prompt'"):
        parse(changed("prompts", columns={"promt": "caption"}))


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
def test_value_of_another_type_is_refused_with_what_it_must_be(section, key, value, must):
    with pytest.raises(JobError, match=f"^{section}.{key} = .*: must be {must}"):
        parse(changed(section, **{key: value}))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [3, None, [1]])
def test_section_that_is_no_section_is_refused(section, value):
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
    ],
)
def test_value_out_of_range_is_refused_with_the_bound(section, key, value, must):
    with pytest.raises(JobError, match=f"^{section}.{key} = {value}: must be {must}"):
        parse(changed(section, **{key: value}))


@pytest.mark.parametrize(("side", "nearest"), [(513, 512), (509, 512), (1, 8), (767, 768)])
def test_side_that_is_no_multiple_of_8_is_refused_with_the_nearest(side, nearest):
    words = f"^sampling.width = {side}: must be a multiple of 8.* Nearest: {nearest}"
    with pytest.raises(JobError, match=words):
        parse(changed("sampling", width=side))


@pytest.mark.parametrize("value", ["auto", 4])
def test_lanes_actors_and_images_per_shard_take_auto_or_a_number(value):
    sections = {"engine": "lanes", "cluster": "actors", "output": "images_per_shard"}
    for section, key in sections.items():
        job = parse(changed(section, **{key: value}))
        assert getattr(getattr(job, section), key) == value


def test_keys_of_sections_in_a_list_are_refused_by_their_place():
    loras = [{"path": "a.safetensors"}, {"pth": "b.safetensors"}]
    with pytest.raises(JobError, match=r"^model.loras.1.pth: unknown key. Did you mean .*1.path"):
        parse(changed("model", loras=[*loras[:1], {"path": "b", **loras[1]}]))
    with pytest.raises(JobError, match=r"^model.loras.1.path = nothing: must be given"):
        parse(changed("model", loras=[*loras[:1], {"weight": 1}]))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eta": 0.5}, "eta = 0.5: must be 0, as dpmpp_2m has none"),
        (
            {"guidance_start": 0.8, "guidance_stop": 0.2},
            "guidance_start = 0.8: must not be after guidance_stop, 0.2",
        ),
    ],
)
def test_sampling_values_that_do_not_fit_together_are_refused(keys, words):
    with pytest.raises(JobError, match=f"^sampling.{words}"):
        parse(changed("sampling", **keys))


def test_quality_is_refused_for_png_with_the_way_out():
    with pytest.raises(JobError, match=r"^output.quality = 90: png is lossless. Leave it out"):
        parse(changed("output", image_format="png", quality=90))


@pytest.mark.parametrize(("image_format", "quality"), [("jpg", 95), ("webp", 90)])
def test_quality_has_a_default_for_each_format_that_loses(image_format, quality):
    assert parse(changed("output", image_format=image_format)).output.encoder_quality == quality


@pytest.mark.parametrize("missing", ["prompts", "model", "output"])
def test_section_without_a_default_must_be_given(missing):
    with pytest.raises(JobError, match=f"^{missing} = nothing: must be given"):
        parse({name: section for name, section in WHOLE.items() if name != missing})


def test_model_is_the_same_as_a_string_and_as_a_section():
    assert parse({**WHOLE, "model": "builtin:shapes"}) == parse(WHOLE)


def test_model_has_a_name_without_folders():
    assert parse(WHOLE).model.name == "builtin:shapes"
    assert parse(changed("model", path="/home/me/my-model/")).model.name == "my-model"


def test_job_is_called_by_its_name_or_else_by_its_outputs():
    assert parse({**WHOLE, "name": "hounds"}).title == "hounds"
    assert parse(changed("output", path="s3://bucket/dogs/")).title == "dogs"


def test_job_cannot_be_changed_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        parse(WHOLE).sampling.seed = 3


def test_file_comes_back_as_written(tmp_path):
    job = load(write(tmp_path, yaml.safe_dump(EVERY_KEY)))
    assert job.model_dump(mode="json") == EVERY_KEY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [\n", "no YAML"),
        ("model: a\n\tb: c\n", "no YAML"),
        ("", "must have prompts, model and output"),
        ("- model\n", "must have prompts, model and output"),
        ("model: a\nmodel: b\n", "line 2: key 'model' stands twice: keep one"),
        ("sampling:\n  seed: 1\n  width: 8\n  seed: 2\n", "line 4: key 'seed' stands twice"),
    ],
)
def test_file_that_is_no_job_is_refused_with_its_path_and_the_fault(tmp_path, text, words):
    file = write(tmp_path, text)
    with pytest.raises(JobError, match=words) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    with pytest.raises(JobError, match=r"nope.yaml = .*must be a readable job file in YAML"):
        load(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(JobError, match=r"latin.yaml = .*must be a readable job file in YAML"):
        load(tmp_path / "latin.yaml")


def test_override_wins_over_the_file_with_its_value_in_yaml(tmp_path):
    file = write(tmp_path, yaml.safe_dump(EVERY_KEY))
    overrides = (
        "sampling.width=64",
        "prompts.columns.prompt=text",
        "prompts.keep=[a, b]",
        "prompts.limit=null",
        "name=",
        "model.path=a=b",
    )
    job = load(file, overrides)
    assert (job.sampling.width, job.prompts.columns["prompt"]) == (64, "text")
    assert (job.prompts.keep, job.prompts.limit) == (["a", "b"], None)
    assert (job.name, job.model.path) == ("", "a=b")
    assert (job.sampling.height, job.prompts.columns["seed"]) == (768, "s")


@pytest.mark.parametrize("overrides", [[], ["model=other"]])
def test_override_of_a_models_key_is_taken_when_the_model_is_a_string(overrides):
    job = parse({**WHOLE, "model": "other"}, [*overrides, "model.revision=v1"])
    assert (job.model.path, job.model.revision) == ("other", "v1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.seed", "^--set 'sampling.seed': must be section.key=value"),
        ("=3", "^--set '=3': must be section.key=value"),
        ("output.path.x=3", "'x' is inside 'out/dogs', which is no section"),
        ("name=[", r"^--set name=\[ = no YAML"),
        ("sampling={seed: 1, seed: 2}", "^--set .*key 'seed' stands twice"),
        ("sampling.sede=3", "Did you mean 'sampling.seed'"),
        ("sampling.seed=three", "^sampling.seed = 'three': must be a whole number"),
    ],
)
def test_override_is_refused_with_its_text_when_it_is_none(override, words):
    with pytest.raises(JobError, match=words):
        parse(WHOLE, [override])


def test_json_schema_accepts_every_key_and_every_job_file():
    jsonschema = pytest.importorskip("jsonschema")
    files = [yaml.safe_load(file.read_text()) for file in (ROOT / "jobs").glob("*.yaml")]
    for values in (EVERY_KEY, WHOLE, {**WHOLE, "model": "builtin:shapes"}, *files):
        jsonschema.validate(values, json.loads(json_schema()))


@pytest.mark.parametrize("section", SECTIONS)
def test_json_schema_refuses_what_parse_refuses(section):
    jsonschema = pytest.importorskip("jsonschema")
    for values in (changed(section, zzz=1), {**WHOLE, section: 3}, {**WHOLE, "zzz": 1}):
        with pytest.raises(jsonschema.ValidationError, match=r"'zzz' was unexpected|3 is not"):
            jsonschema.validate(values, json.loads(json_schema()))


def test_reading_a_job_file_loads_neither_torch_nor_ray():
    probe = "import sys, sdbatch.job; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr
