"""Which files identify a model: its hash changes with each of them, and with no other."""

import os
import shutil

import pytest

from sdbatch.errors import ModelError
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models import find_model
from sdbatch.models.find_model import CHECKER
from sdbatch.models.sd1 import LAYOUT
from sdbatch.registry import EMBEDDED_MODEL
from tests import tiny
from tests.models.load import find, unhashed

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
        model = find(path, vae=vae, checker=CHECKER, loras=LORAS, embeddings=embeddings)
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
