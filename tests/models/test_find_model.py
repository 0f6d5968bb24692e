"""Which models and files are found, which identify a model, and which are rejected."""

import json
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdbatch.errors import ModelError
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models import find_model
from sdbatch.models.find_model import CHECKER
from sdbatch.models.sd1 import LAYOUT
from sdbatch.registry import EMBEDDED_MODEL
from tests import tiny
from tests.models.load import (
    CHECKER_KEY,
    EMBEDDING_KEY,
    LORA_KEY,
    VAE_KEY,
    find,
    have_same_weights,
    load,
    settings_with,
    unhashed,
)

FILE = "must be a local file that ends in .*, or a hub id. Check the path"
NOT_ON_HUB = "no such local file or folder, and the hub did not deliver it"
FOLDER = "must be a local folder with config.json and weights.*a hub id does not work here"
VAE_FOLDER = "must be a local folder with config.json and weights, or a hub id"
UNREADABLE = "cannot be read as weights"


@pytest.mark.parametrize(
    ("key", "path", "reason"),
    [
        (LORA_KEY, "missing.safetensors", FILE),
        (LORA_KEY, "someone/some-lora", NOT_ON_HUB),
        (LORA_KEY, "empty", "the folder has none of pytorch_lora_weights.safetensors"),
        (
            LORA_KEY,
            "word.pt",
            "is an embedding: must be a LoRA of Stable Diffusion 1.x. It belongs",
        ),
        (LORA_KEY, "vae.safetensors", "is a VAE: must be a LoRA .* It belongs into model.vae"),
        (LORA_KEY, "torn.safetensors", UNREADABLE),
        (LORA_KEY, "null.safetensors", UNREADABLE),
        (EMBEDDING_KEY, "missing.pt", FILE),
        (EMBEDDING_KEY, "sd-concepts-library/cat-toy", NOT_ON_HUB),
        (EMBEDDING_KEY, "torn.pt", UNREADABLE),
        (EMBEDDING_KEY, "no_tensors.safetensors", "is a file without tensors"),
        (VAE_KEY, "lora.safetensors", "is a LoRA: must be a VAE .* It belongs into model.loras"),
        (VAE_KEY, "no_tensors.safetensors", "is a file without tensors"),
        (EMBEDDING_KEY, "hostile.pt", "its pickle would run posix.system, so it was not opened"),
        (VAE_KEY, "missing.safetensors", FILE),
        (VAE_KEY, "stabilityai/sd-vae-ft-mse", NOT_ON_HUB),
        (VAE_KEY, "torn.safetensors", UNREADABLE),
        (VAE_KEY, "empty", VAE_FOLDER),
        (VAE_KEY, "vae_without_weights", VAE_FOLDER),
        (CHECKER_KEY, "CompVis/stable-diffusion-safety-checker", FOLDER),
        (CHECKER_KEY, "empty", FOLDER),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_rejected_before_anything_is_loaded(
    tiny_model, extra_files, key, path, reason
):
    with pytest.raises(ModelError, match=rf"^{key} = .*{path}.*{reason}") as rejected:
        find(tiny_model, **settings_with(key, path))
    assert "\n" not in str(rejected.value)
    assert not (extra_files / "OWNED").exists()


def test_a_path_without_a_model_is_rejected_with_the_way_out(tmp_path, tiny_model):
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_bytes(b"no model at all")
    (tmp_path / "text.txt").write_text("hello")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    cases = {
        "half": "no weights in unet/",
        "empty": "has no model_index.json",
        "junk.safetensors": UNREADABLE,
        "text.txt": "must end in .safetensors or .ckpt",
        "other.ckpt": "is an embedding: must be a whole Stable Diffusion 1.x checkpoint",
        "missing/folder/deep": "no such file or folder",
    }
    for name, reason in cases.items():
        with pytest.raises(ModelError, match=reason):
            find(tmp_path / name)
    with pytest.raises(ModelError, match=f"the only embedded model is {EMBEDDED_MODEL}"):
        find("builtin:dogs")
    for path in (tiny_model, EMBEDDED_MODEL):
        with pytest.raises(ModelError, match=r"model.revision = 'main': only a hub id has one"):
            find(path, revision="main")
    with pytest.raises(ModelError, match="the hub did not deliver it"):
        find("no-such/model")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (json.dumps({"_class_name": "FluxPipeline"}), "names the pipeline 'FluxPipeline': must be"),
        ("{", "its model_index.json cannot be read"),
        ("[1]", "its model_index.json cannot be read"),
    ],
)
def test_a_folder_of_an_unknown_pipeline_is_rejected(copied, index, reason):
    (copied / "model_index.json").write_text(index)
    with pytest.raises(ModelError, match=rf"^model.path = .*copied.*{reason}") as rejected:
        find(copied)
    assert "\n" not in str(rejected.value)


def add_variant(folder, other_model, *, keep_plain):
    """Add the other model's weights as the fp16 ones."""
    for part in LAYOUT.weights:
        (file,) = (folder / part).glob("*.safetensors")
        shutil.copy(other_model / part / file.name, file.with_suffix(".fp16.safetensors"))
        if not keep_plain:
            file.unlink()


def test_the_only_variant_is_chosen_without_being_named(copied, other_model):
    add_variant(copied, other_model, keep_plain=False)
    files = find(copied)
    assert files.settings.variant == "fp16"
    assert have_same_weights(load(copied), StableDiffusionPipeline.from_pretrained(other_model))
    assert unhashed(files, copied.rglob("*.fp16.safetensors")) == []


def test_of_several_variants_the_named_one_is_loaded(copied, tiny_model, other_model):
    add_variant(copied, other_model, keep_plain=True)
    assert have_same_weights(load(copied), StableDiffusionPipeline.from_pretrained(tiny_model))
    fp16 = StableDiffusionPipeline.from_pretrained(copied, variant="fp16")
    assert have_same_weights(load(copied, variant="fp16"), fp16)
    assert have_same_weights(fp16, StableDiffusionPipeline.from_pretrained(other_model))
    plain, named = find(copied), find(copied, variant="fp16")
    assert find_model.sha256(plain) != find_model.sha256(named)
    assert len(unhashed(plain, copied.rglob("*.fp16.safetensors"))) == len(LAYOUT.weights)


def test_a_missing_variant_is_rejected_with_those_that_exist(copied, other_model):
    add_variant(copied, other_model, keep_plain=True)
    reason = "model.variant = 'bf16': all parts of .*copied have plain weights, fp16"
    with pytest.raises(ModelError, match=reason):
        find(copied, variant="bf16")
    (copied / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bf16.safetensors"))
    for variant in (None, "fp16"):
        reason = f"model.variant = {variant!r}: all parts of .* have no variant in common"
        with pytest.raises(ModelError, match=reason):
            find(copied, variant=variant)


def test_a_part_without_the_variant_of_the_others_has_its_plain_weights(
    copied, tiny_model, other_model
):
    add_variant(copied, other_model, keep_plain=False)
    shutil.copy(tiny_model / "vae" / PLAIN, copied / "vae")
    (copied / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    for variant in (None, "fp16"):
        files = find(copied, variant=variant)
        assert files.settings.variant == "fp16"
        assert files.variants == {"text_encoder": "fp16", "unet": "fp16", "vae": None}
        assert unhashed(files, copied.glob("*/*.safetensors")) == []
    loaded, plain, other = load(copied), load(tiny_model), load(other_model)
    assert torch.equal(loaded.vae.quant_conv.weight, plain.vae.quant_conv.weight)
    assert torch.equal(loaded.unet.conv_in.weight, other.unet.conv_in.weight)


def test_plain_bin_weights_are_loaded_before_a_variant_that_nobody_asked_for(
    copied, tiny_model, other_model
):
    add_variant(copied, other_model, keep_plain=True)
    file = copied / "unet" / PLAIN
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert find(copied).settings.variant is None
    assert have_same_weights(load(copied), load(tiny_model))


PLAIN = "diffusion_pytorch_model.safetensors"


def test_a_variant_of_a_model_that_has_none_is_rejected(tiny_model, tmp_path):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    for path in ("builtin:shapes", tmp_path / "model.safetensors"):
        with pytest.raises(ModelError, match=r"model.variant = 'fp16'"):
            find(path, variant="fp16")


def test_a_checker_of_plain_weights_in_a_folder_of_a_variant_is_found_and_hashed(copied):
    for file in list(copied.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    checker = copied / find_model.CHECKER
    checker.mkdir()
    (checker / "config.json").write_text(json.dumps({}))
    save_file({}, checker / "model.safetensors")
    files = find(copied)
    assert files.settings.variant == "fp16"
    assert files.variants[find_model.CHECKER] is None
    assert checker / "model.safetensors" in find_model.hashed_files(files)


LORAS = [Lora(path="lora.safetensors")]


def files_in(*folders):
    return [file for folder in folders for file in folder.rglob("*") if file.is_file()]


def test_sha256_follows_the_weights(tiny_model, copied):
    one, two = find(tiny_model), find(copied)
    assert find_model.sha256(one) == find_model.sha256(two)
    with (copied / "unet" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert find_model.sha256(one) != find_model.sha256(two)


@pytest.mark.parametrize("vae", ["vae", "vae.safetensors"])
def test_sha256_follows_every_file_that_is_named_besides_the_model(
    tiny_model, copied, extra_files, vae
):
    embeddings = [
        Embedding(path="word.pt", token="<a>"),
        Embedding(path="word.safetensors", token="<b>"),
    ]
    tiny.write_file(tiny_model, extra_files / "model.safetensors")
    names = ("lora.safetensors", "word.pt", "word.safetensors")
    named = [extra_files / name for name in names]
    named += files_in(extra_files / vae) or [extra_files / vae]
    named += files_in(extra_files / CHECKER)
    own = files_in(*(copied / part for part in (*LAYOUT.weights, "tokenizer", "scheduler")))
    single = [extra_files / "model.safetensors"]
    for path, files in {"copied": own, "model.safetensors": single}.items():
        extras = {"vae": vae, "loras": LORAS, "embeddings": embeddings}
        model = find(path, checker=CHECKER, config=str(tiny_model), **extras)
        assert unhashed(model, [*named, *files]) == []
        assert set(named) <= set(find_model.hashed_files(model))


def test_sha256_follows_every_file_of_the_models_own_checker(copied, extra_files):
    shutil.copytree(extra_files / CHECKER, copied / CHECKER)
    model = find(copied)
    assert model.checker == find_model.OWN_CHECKER
    assert unhashed(model, files_in(copied / CHECKER)) == []
    unchecked = find(copied, checker="none")
    assert len(unhashed(unchecked, files_in(copied / CHECKER))) == 2  # as they are not loaded


def test_sha256_of_the_embedded_model_is_of_its_files_and_of_those_named_besides_it(extra_files):
    model = find(EMBEDDED_MODEL, loras=LORAS)
    own = find_model.hashed_files(find(EMBEDDED_MODEL))
    assert {file.parent.name for file in own} == {"tokenizer", "scheduler", *LAYOUT.weights}
    assert find_model.hashed_files(model) == [extra_files / "lora.safetensors", *own]
    assert unhashed(model, [extra_files / "lora.safetensors"]) == []


def test_a_file_that_cannot_be_read_is_an_error_of_one_line(copied):
    files = find(copied)
    (copied / "unet" / "config.json").unlink()
    (copied / "unet" / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"model.path = .*copied: cannot be read") as error:
        find_model.sha256(files)
    assert "\n" not in str(error.value)
