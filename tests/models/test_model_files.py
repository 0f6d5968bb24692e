"""Files that are no model, or a model of another kind: one line before anything is loaded."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdbatch.errors import ModelError
from sdbatch.job.sections import Embedding
from tests import tiny
from tests.models.load import (
    EMBEDDING_KEY,
    LORA_KEY,
    VAE_KEY,
    find,
    load,
    settings_with,
)
from tests.models.test_identify import CHECKPOINTS, LORAS, PARTS, SD15, vae

MODEL_KEY = "model.path"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n"
NOT_WEIGHTS = {
    "git-lfs": (POINTER, "is a git-lfs pointer.*Run git lfs pull"),
    "html": (b"<!DOCTYPE html><html>Sign in</html>", r"is a web page \(HTML\).*download link"),
    "html with spaces": (b"\n  <HTML><body>404</body>", r"is a web page \(HTML\)"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is an XML document"),
    "json": (b'{"error": "Unauthorized"}', "is a JSON document"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), r"is a picture \(PNG\)"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "is a GGUF file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive. Unpack|is a gzip archive"),
    "rar": (b"Rar!\x1a\x07\x01\0" + bytes(50), "is a RAR archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "is a 7z archive"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "zeros": (bytes(1000), "neither safetensors nor torch.save's format"),
    "text": (b"hello, this is not a model", "neither safetensors nor torch.save's format"),
}


def spread(tensors):
    """Return tensors of these shapes, with at most one row, and so few elements."""
    return {
        name: torch.zeros((1, *shape[1:2], *(1 for _ in shape[2:])) if len(shape) > 1 else (1,))
        for name, shape in tensors.items()
    }


def settings(key, path, tiny_model):
    """Return the path and the settings of a job that names `path` at `key`."""
    if key == MODEL_KEY:
        return path, {}
    return tiny_model, settings_with(key, str(path))


@pytest.mark.parametrize("key", [MODEL_KEY, LORA_KEY, VAE_KEY, EMBEDDING_KEY])
@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_people_have_instead_of_weights_is_named(tiny_model, extra_files, key, name):
    content, words = NOT_WEIGHTS[name]
    suffix = "pt" if key == EMBEDDING_KEY else "safetensors"
    (extra_files / f"got.{suffix}").write_bytes(content)
    path, more = settings(key, f"got.{suffix}", tiny_model)
    with pytest.raises(ModelError, match=rf"^{key} = got.{suffix}: .*{words}") as refused:
        find(path, **more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "size", "words"),
    [
        ("safetensors", -1, r"it is cut off: it has \d+ bytes of \d+"),
        ("safetensors", 20_000, r"it is cut off: it has 20000 bytes of \d+"),
        ("safetensors", 300, r"it is cut off: it has 300 bytes of \d+"),
        ("ckpt", -100, "it is cut off or damaged"),
        ("ckpt", 20_000, "it is cut off or damaged"),
    ],
)
def test_a_download_that_was_cut_off_is_named_with_its_size(
    tiny_model, tmp_path, suffix, size, words
):
    file = tmp_path / f"model.{suffix}"
    tiny.write_file(tiny_model, file)
    os.truncate(file, size if size > 0 else file.stat().st_size + size)
    with pytest.raises(ModelError, match=rf"{words}.*Download the file again") as refused:
        find(file, config=str(tiny_model))
    assert len(str(refused.value)) < 400


def test_an_old_pickle_that_was_cut_off_is_named(tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    os.truncate(file, 150)
    with pytest.raises(ModelError, match="cannot be read as weights"):
        find(file)


def test_an_archive_that_holds_a_model_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("model.safetensors", "weights")
    with pytest.raises(ModelError, match=r"a zip archive without data.pkl: unpack it first"):
        find(tmp_path / "model.ckpt")


OTHER_MODELS = {
    name: case for name, case in {**CHECKPOINTS, **PARTS}.items() if not name.startswith("sd15")
}
OTHER_MODELS |= {f"lora {name}": (case[0], "", "", case[2]) for name, case in LORAS.items()}
del OTHER_MODELS["nai"]


@pytest.mark.parametrize(
    ("tensors", "words"), [(c[0], c[3]) for c in OTHER_MODELS.values()], ids=OTHER_MODELS
)
def test_a_model_of_another_kind_is_refused_in_one_line_with_the_way_out(tmp_path, tensors, words):
    save_file(spread(tensors), tmp_path / "x.safetensors")
    start = r"^model.path = .*x.safetensors: is (a|an|no|for) .*"
    reason = f"{start}must be a whole Stable Diffusion 1.x checkpoint for text to image. [A-Z].*"
    with pytest.raises(ModelError, match=reason) as refused:
        find(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


WRONG = {
    "lora of sdxl": (LORA_KEY, LORAS["kohya sdxl"][0], "is a LoRA of SDXL: must be a LoRA of Stab"),
    "lora of sd2": (LORA_KEY, LORAS["kohya sd2"][0], "is a LoRA of Stable Diffusion 2.x: must be"),
    "lora of flux": (LORA_KEY, LORAS["flux of kohya"][0], "is a LoRA of Flux: must be a LoRA of"),
    "checkpoint as lora": (
        LORA_KEY,
        SD15,
        "1.x checkpoint: must be a LoRA .*belongs into model.path",
    ),
    "controlnet as lora": (LORA_KEY, PARTS["controlnet"][0], "is a ControlNet: must be a LoRA"),
    "vae of flux": (VAE_KEY, vae(channels=16), "is a VAE of 16 latent channels"),
    "checkpoint as vae": (VAE_KEY, SD15, "checkpoint: must be a VAE .*belongs into model.path"),
    "lora as embedding": (
        EMBEDDING_KEY,
        LORAS["kohya sd1"][0],
        "must be an embedding .*model.loras",
    ),
    "embedding of sd2": (
        EMBEDDING_KEY,
        {"emb_params": (1, 1024)},
        "is an embedding of Stable Diff",
    ),
    "embedding of sdxl": (
        EMBEDDING_KEY,
        {"clip_l": (1, 768), "clip_g": (1, 1280)},
        "of SDXL: must",
    ),
    "hypernetwork": (EMBEDDING_KEY, PARTS["hypernetwork"][0], "is a hypernetwork: must be an"),
}


@pytest.mark.parametrize(("key", "tensors", "words"), WRONG.values(), ids=WRONG)
def test_a_file_of_another_kind_or_model_than_its_key_needs_is_refused(
    tiny_model, extra_files, key, tensors, words
):
    save_file(spread(tensors), "given.safetensors")
    with pytest.raises(ModelError, match=rf"^{key} = 'given.safetensors': .*{words}"):
        find(tiny_model, **settings_with(key, "given.safetensors"))


def test_a_git_lfs_pointer_in_a_folder_is_refused(copied):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"model.path = .*unet/.*git-lfs pointer.*git lfs pull"):
        find(copied)


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt", "tokenizer_config.json")])
def test_a_tokenizer_without_its_vocabulary_is_refused(copied, names):
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    for name in ("special_tokens_map.json", *names):
        (copied / "tokenizer" / name).write_text("{}")
    with pytest.raises(ModelError, match=r"its tokenizer/ has no vocabulary: must have vocab.json"):
        find(copied)


def test_a_tokenizer_of_vocab_json_and_merges_txt_is_enough(copied, model):
    vocabulary = model.tokenizer.get_vocab()
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (copied / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(copied).tokenizer
    assert tokenizer("a red dog").input_ids == model.tokenizer("a red dog").input_ids


@pytest.mark.parametrize("extra", [{}, {str(i): 600 + i for i in range(400)}], ids=["few", "many"])
def test_a_tokenizer_of_another_vocabulary_than_the_text_encoders_is_refused(copied, model, extra):
    (copied / "tokenizer" / "tokenizer.json").unlink()
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1} | extra
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match=r"its tokenizer has \d+ words and its text encoder 514"):
        load(copied)


CONFIGS = {
    "depth": ({"in_channels": 5}, "is a model for depth .in_channels 5"),
    "upscaling": ({"in_channels": 7}, "is a model for upscaling .in_channels 7"),
    "6 channels": ({"in_channels": 6}, "is a model for other inputs .in_channels 6"),
    "lcm of 9 channels": ({"in_channels": 9, "time_cond_proj_dim": 256}, "model with more inputs"),
    "sdxl inpainting": ({"in_channels": 9, "cross_attention_dim": 2048}, "is SDXL"),
    "sdxl": ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "is SDXL"),
    "lcm": ({"time_cond_proj_dim": 256}, "use the LoRA of an LCM"),
}


@pytest.mark.parametrize(("config", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_another_kind_is_refused_by_its_configuration(copied, config, words):
    file = copied / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ModelError, match=rf"^model.path = .*copied: .*{words}.*Choose another"):
        find(copied)


def test_averaged_weights_of_only_a_part_are_refused_unless_ema_is_off(tiny_model, tmp_path, model):
    file = tmp_path / "model.safetensors"
    tiny.write_file(tiny_model, file)
    weights = load_file(file)
    names = [name for name in weights if name.startswith("model.diffusion_model.")]
    averaged = "model_ema." + names[0].removeprefix("model.").replace(".", "")
    save_file(weights | {averaged: weights[names[0]].clone()}, file)
    reason = rf"holds averaged weights of 1 of {len(names)} .*Set model.ema to false"
    with pytest.raises(ModelError, match=reason):
        find(file, config=str(tiny_model))
    loaded = load(file, config=str(tiny_model), ema=False)
    assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight)


def test_a_unet_of_another_architecture_than_its_configuration_is_refused(tiny_model, tmp_path):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    reason = r"has 4 input blocks for text of width 32: must have 12 for 768.*Set model.config"
    with pytest.raises(ModelError, match=reason):
        find(tmp_path / "model.safetensors")


@pytest.mark.parametrize("config", ["builtin:sd9", "/nowhere", "not a hub id"])
def test_a_configuration_that_is_nowhere_is_refused(tiny_model, tmp_path, config):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"^model.config = .*no such folder: must be a hub id or"):
        find(tmp_path / "model.safetensors", config=config)


def test_a_configuration_without_a_part_is_refused(tiny_model, tmp_path, copied):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    shutil.rmtree(copied / "vae")
    with pytest.raises(ModelError, match=r"^model.config = .*copied': has no vae/config.json"):
        find(tmp_path / "model.safetensors", config=str(copied))


def test_of_several_words_in_a_file_the_job_names_one(tiny_model, extra_files):
    save_file({"<a>": torch.ones(1, 32), "<b>": torch.ones(1, 32)}, "words.safetensors")
    embedding = Embedding(path="words.safetensors", token="<c>")
    reason = r"^model.embeddings.0.token = '<c>': .*holds several words, <a>, <b>: must be one"
    with pytest.raises(ModelError, match=reason):
        find(tiny_model, embeddings=[embedding])


def test_a_shard_that_is_missing_is_named(copied, model):
    unet = copied / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    model.unet.save_pretrained(unet, max_shard_size="100KB")
    shards = sorted(unet.glob("*-of-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"of the {len(shards)} files of unet/.* number 2 is mis"):
        find(copied)
