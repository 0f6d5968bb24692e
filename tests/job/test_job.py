"""The job file: its errors and their texts, overrides, the JSON Schema."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdbatch.errors import JobError
from sdbatch.job import Job, json_schema, load, parse

ROOT = Path(__file__).parents[2]
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
  source: file
  images_per_row: 4
  limit: 1000
  size_from_image: true
  frames: 3
  rows: null
  reader: {format: csv, separator: ";", names: [i, caption], quotes: true, encoding: cp1252,
           field: null}
model: {path: m, revision: main, variant: fp16, config: c, ema: false, zero_snr: true,
        prediction_type: v_prediction, vae: v, loras: [{path: l.safetensors, name: l, weight: 0.5}],
        embeddings: [{path: e.pt, token: <e>}], sha256: "0", tiling: true}
sampling: {sampler: ddim, num_inference_steps: 50, guidance_scale: 7, guidance_rescale: 0.7,
           guidance_start: 0.1, guidance_stop: 0.9, guidance_sigma_low: 0.3,
           guidance_sigma_high: 5, negative_prompt: blurry, eta: 0.5,
           height: 768, width: 512, seed: 9223372036854775807, clip_skip: 1,
           prompt_weights: true, chunk_prompts: true, loras: "l:0.3", cache_interval: 3,
           strength: 0.5, compat: a1111, sample_posterior: true, fit: pad, resample: box,
           mask_from_alpha: true, mask_blur: 4, mask_fill: noise, only_masked: true,
           only_masked_padding: 8, image_guidance_scale: 2, variation_seed: 7,
           variation_strength: 0.1, prompt_b: a cat, seed_b: 5, mix: 0, hires_scale: 2,
           hires_upscaler: lanczos, hires_steps: 9, hires_strength: 0.5}
engine: {device: cpu, dtype: float32, lanes: 8, threads: 2, channels_last: true, compile: true,
         attention: torch, decode_group: 2, split_k: false, rewrites: [text_kv], fp8_linears: true}
cluster:
  actors: 2
  label_selector: {ray.io/accelerator-type: "in(A100,H100)"}
  gpus_per_actor: 0.5
  cpus_per_actor: 2
  address: auto
output: {path: out, format: webdataset, image_format: webp, quality: 80, compression: null,
         images_per_shard: 100}
safety: {checker: none, policy: drop}
stages: [{score: shapes}]
serve: {aliases: [gpt-image-1], min_replicas: 2, max_replicas: 4, queue: 10, timeout_s: 60,
        keep_s: 90, keep_mib: 10, keep: "s3://bucket/kept", keys: k.yaml, log_prompts: true,
        public_url: "https://images.example.org", cors_origins: ["https://app.example.org"],
        limits: {images: 4, images_per_minute: 60, pixels: 262144, num_inference_steps: 50}}
""")
SECTIONS = ("prompts", "model", "sampling", "engine", "cluster", "output", "safety", "serve")


def changed(section, **keys):
    """Return a whole job's values with `keys` of `section` changed."""
    return {**WHOLE, section: {**WHOLE.get(section, {}), **keys}}


def write(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ("prompts", "colums", "columns"),
        ("model", "revison", "revision"),
        ("sampling", "guidence_scale", "guidance_scale"),
        ("engine", "lane", "lanes"),
        ("cluster", "actor", "actors"),
        ("output", "image_fromat", "image_format"),
        ("safety", "polcy", "policy"),
        ("serve", "que", "queue"),
    ],
)
def test_unknown_key_of_a_section_is_rejected_with_a_suggestion(section, key, suggestion):
    words = f"^{section}.{key}: unknown key. Did you mean '{section}.{suggestion}'"
    with pytest.raises(JobError, match=words):
        parse(changed(section, **{key: 1}))


def test_unknown_section_is_rejected_with_a_suggestion():
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
def test_unknown_key_is_named_even_with_dots_or_the_name_of_a_type(key):
    with pytest.raises(JobError, match=f"^{key}: unknown key"):
        parse({**WHOLE, key: 1})


def test_unknown_name_in_columns_is_rejected_with_a_suggestion_or_the_known_names():
    words = r"prompts.columns.promt: unknown key. Did you mean 'prompts.columns.prompt'"
    with pytest.raises(JobError, match=words):
        parse(changed("prompts", columns={"promt": "caption"}))
    words = r"prompts.columns.zzz: unknown key. Known: id, prompt, negative_prompt, seed"
    with pytest.raises(JobError, match=words):
        parse(changed("prompts", columns={"zzz": "caption"}))


def test_job_file_is_loaded_exactly_as_written(tmp_path):
    job = load(write(tmp_path, yaml.safe_dump(EVERY_KEY)))
    assert job.model_dump(mode="json") == EVERY_KEY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [\n", "not YAML"),
        ("model: a\n\tb: c\n", "not YAML"),
        ("", "must have prompts, model and output"),
        ("- model\n", "must have prompts, model and output"),
        ("model: a\nmodel: b\n", "line 2: key 'model' appears twice: keep one"),
        ("sampling:\n  seed: 1\n  width: 8\n  seed: 2\n", "line 4: key 'seed' appears twice"),
    ],
)
def test_file_that_is_not_a_job_is_rejected_with_its_path_and_the_reason(tmp_path, text, words):
    file = write(tmp_path, text)
    with pytest.raises(JobError, match=words) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_rejected_with_its_path(tmp_path):
    with pytest.raises(JobError, match=r"nope.yaml = .*must be a readable job file in YAML"):
        load(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(JobError, match=r"latin.yaml = .*must be a readable job file in YAML"):
        load(tmp_path / "latin.yaml")


def test_override_wins_over_the_file_and_its_value_is_yaml(tmp_path):
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
def test_override_of_a_model_key_works_when_the_model_is_a_string(overrides):
    job = parse({**WHOLE, "model": "other"}, [*overrides, "model.revision=v1"])
    assert (job.model.path, job.model.revision) == ("other", "v1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.seed", "^--set 'sampling.seed': must be section.key=value"),
        ("=3", "^--set '=3': must be section.key=value"),
        ("output.path.x=3", "'x' is inside 'out/dogs', which is not a section"),
        ("name=[", r"^--set name=\[ = not YAML"),
        ("sampling={seed: 1, seed: 2}", "^--set .*key 'seed' appears twice"),
        ("sampling.sede=3", "Did you mean 'sampling.seed'"),
        ("sampling.seed=three", "^sampling.seed = 'three': must be a whole number"),
    ],
)
def test_invalid_override_is_rejected_with_its_text(override, words):
    with pytest.raises(JobError, match=words):
        parse(WHOLE, [override])


def test_json_schema_accepts_every_key_and_every_job_file():
    jsonschema = pytest.importorskip("jsonschema")
    files = [yaml.safe_load(file.read_text()) for file in (ROOT / "jobs").glob("*.yaml")]
    for values in (EVERY_KEY, WHOLE, {**WHOLE, "model": "builtin:shapes"}, *files):
        jsonschema.validate(values, json.loads(json_schema()))


@pytest.mark.parametrize("section", SECTIONS)
def test_json_schema_rejects_what_parse_rejects(section):
    jsonschema = pytest.importorskip("jsonschema")
    for values in (changed(section, zzz=1), {**WHOLE, section: 3}, {**WHOLE, "zzz": 1}):
        with pytest.raises(jsonschema.ValidationError, match=r"'zzz' was unexpected|3 is not"):
            jsonschema.validate(values, json.loads(json_schema()))


def test_reading_a_job_file_loads_neither_torch_nor_ray():
    probe = "import sys, sdbatch.job; print({'torch', 'ray'} & set(sys.modules))"
    probed = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert probed.stdout.strip() == "set()", probed.stderr


@pytest.mark.parametrize("path", ["", " ", "/", "s3://", "gs://", "s3:///x", "s3:/b/x", "file://"])
def test_an_output_path_that_names_no_folder_is_rejected(path):
    with pytest.raises(
        JobError, match=rf"^output.path = {re.escape(repr(path))}: must be a folder"
    ):
        parse({"prompts": {"path": "a.csv"}, "model": "m", "output": {"path": path}})
