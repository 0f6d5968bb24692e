"""Models and files on the Hugging Face hub, from a cache in the hub's own layout, offline."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sdbatch.job import Job
from sdbatch.models import hub
from sdbatch.output import identity
from tests.tiny import TEXT_WIDTH

COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# Finds the models of the settings in argv, and loads the first; prints what the jobs then record,
# or the errors.
PROBE = """
import json, sys
from sdbatch.errors import ModelError
from sdbatch.job import Job
from sdbatch.models.find_model import sha256
from sdbatch.resolve import find_model
for number, model in enumerate(json.loads(sys.argv[1])):
    job = {"prompts": {"rows": [{"prompt": "a"}]}, "model": model, "output": {"path": "out"}}
    try:
        files, job = find_model(Job.model_validate(job))
    except ModelError as error:
        print(json.dumps({"error": str(error)}))
        continue
    found = {**job.model.model_dump(mode="json"), "hash": sha256(files)}
    if number == 0:
        from sdbatch.models.build import Build
        from sdbatch.models.sd1 import loading
        loaded = loading.load(files, Build("cpu", "float32"))
        found["sums"] = [
            loaded.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight,
            loaded.vae.quant_conv.weight, loaded.text_encoder.get_input_embeddings().weight]
        found["sums"] = [weight.sum().item() for weight in found["sums"]]
    print(json.dumps(found))
"""


def add_repository(cache, name, commit=COMMIT):
    """Return the folder of a repository's only commit, to be filled."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, tiny_model, other_model):
    """A cache with the tiny model, in float16 only, and a LoRA, a VAE and embeddings."""
    folder = add_repository(tmp_path, "someone/tiny")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    for file in list(folder.glob("*/*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    lora = {f"{TO_Q}.lora_A.weight": torch.ones(4, 32), f"{TO_Q}.lora_B.weight": torch.ones(32, 4)}
    folder = add_repository(tmp_path, "someone/lora")
    save_file(lora, folder / "pytorch_lora_weights.safetensors")
    (folder / "more").mkdir()
    save_file({k: 2 * v for k, v in lora.items()}, folder / "more" / "strong.safetensors")
    shutil.copytree(
        other_model / "vae", add_repository(tmp_path, "someone/vae"), dirs_exist_ok=True
    )
    word = {"<cat>": torch.full((2, TEXT_WIDTH), 0.5)}
    torch.save(word, add_repository(tmp_path, "someone/cat") / "learned_embeds.bin")
    save_file({}, add_repository(tmp_path, "someone/odd") / "unusual.safetensors")
    return tmp_path


def probe(cache, *models):
    """Return what a process without a network finds, and loads of the first."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(models)],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


MISSING = [
    ("model.vae", "someone/nothing", "no such local file or folder, and the hub did not deliver"),
    ("model.vae", "someone/odd", "must be a local folder with config.json and weights, or a hub"),
    ("model.loras.0.path", "someone/odd", "has none of pytorch_lora_weights.safetensors.*Write"),
    ("model.loras.0.path", "someone/lora/other.safetensors", "has no such file, or is not here"),
    ("model.loras.0.path", "someone/odd/unusual.safetensors", "is a file without tensors: must be"),
    ("model.loras.0.path", f"someone/lora@{LATER}", "no such local file or folder, and the hub"),
]


def test_files_on_the_hub_are_loaded_and_recorded_with_their_commits(cache, model, tiny_model):
    whole = {
        "path": "someone/tiny",
        "vae": "someone/vae",
        "loras": [{"path": "someone/lora"}, {"path": "someone/lora@main/more/strong.safetensors"}],
        "embeddings": [{"path": "someone/cat", "token": "<cat>"}],
    }
    broken = [
        {"vae": path} if key == "model.vae" else {"loras": [{"path": path}]}
        for key, path, _ in MISSING
    ]
    found, *errors = probe(cache, whole, *({"path": str(tiny_model), **each} for each in broken))
    assert (found["revision"], found["variant"]) == (COMMIT, "fp16")
    assert found["vae"] == f"someone/vae@{COMMIT}"
    assert [lora["path"] for lora in found["loras"]] == [
        f"someone/lora@{COMMIT}",
        f"someone/lora@{COMMIT}/more/strong.safetensors",
    ]
    assert found["embeddings"][0]["path"] == f"someone/cat@{COMMIT}"
    assert found["hash"] is None  # the commits identify all of it
    to_q = model.unet.get_parameter(f"{TO_Q.removeprefix('unet.')}.weight").sum().item()
    words = model.text_encoder.get_input_embeddings().weight.sum().item()
    assert found["sums"][0] == pytest.approx(to_q + 32 * 32 * (4 + 16), abs=0.1)
    assert found["sums"][1] != pytest.approx(model.vae.quant_conv.weight.sum().item(), abs=0.001)
    assert found["sums"][2] == pytest.approx(words + TEXT_WIDTH, abs=0.1)
    for (key, path, words), error in zip(MISSING, errors, strict=True):
        assert re.match(rf"{key} = '{path}': .*{words}", error["error"]), error


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/b", ("a/b", None, None)),
        ("a/b@main", ("a/b", "main", None)),
        ("a/b/c/d.safetensors", ("a/b", None, "c/d.safetensors")),
        ("a/b@v1.0/d.safetensors", ("a/b", "v1.0", "d.safetensors")),
    ],
)
def test_a_path_on_the_hub_has_an_owner_a_name_a_revision_and_a_file(path, parts):
    assert hub.parse(path) == hub.HubPath(*parts)
    assert str(hub.parse(path)) == path


@pytest.mark.parametrize("path", ["/a/b", "./a/b", "../a/b", "a", "a.safetensors", "a//b", "~/a/b"])
def test_a_local_path_is_not_on_the_hub(path):
    assert hub.parse(path) is None


def job_of(**model):
    rows = {"rows": [{"prompt": "a"}]}
    whole = {"prompts": rows, "model": {"path": "a/b", **model}, "output": {"path": "out"}}
    return Job.model_validate(whole)


def test_a_run_goes_on_with_the_commits_that_the_output_has():
    existing = job_of(
        revision=COMMIT, vae=f"a/vae@{COMMIT}", loras=[{"path": f"a/lora@{COMMIT}/x.safetensors"}]
    )
    loras = [{"path": "a/lora/x.safetensors"}]
    assert identity.with_commits(job_of(vae="a/vae", loras=loras), existing) == existing
    other = job_of(revision=LATER, vae=f"a/vae@{LATER}", loras=[{"path": "a/other"}])
    assert identity.with_commits(other, existing) == other


def test_the_commit_of_a_file_on_the_hub_is_part_of_the_identity():
    versions = identity.versions()
    one, two = (
        identity.fingerprint(job_of(loras=[{"path": f"a/lora@{commit}"}]), versions)
        for commit in (COMMIT, LATER)
    )
    assert one != two
    here, there = (
        identity.fingerprint(job_of(loras=[{"path": f"{folder}/x.safetensors"}]), versions)
        for folder in ("/here", "/there")
    )
    assert here == there
