"""Variants of a model's weights, such as fp16: which one is chosen, loaded and hashed."""

import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline

from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.sd1 import LAYOUT
from tests import tiny
from tests.models.load import find, have_same_weights, load, unhashed


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
    for variant in (None, "fp16"):
        reason = f"model.variant = {variant!r}: all parts of .* have no variant in common"
        with pytest.raises(ModelError, match=reason):
            find(copied, variant=variant)


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
    (checker / "model.safetensors").write_bytes(b"weights")
    files = find(copied)
    assert (files.settings.variant, find_model.checker_variant(files)) == ("fp16", None)
    assert checker / "model.safetensors" in find_model.hashed_files(files)
