"""What stands beside a model's weights: how it is found, hashed, and refused in one line."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.find_model import CHECKER, PARTS, Extras, ModelFiles
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.loading import Build
from tests import tiny
from tests.models.test_loading import RunsCode, same
from tests.tiny import TEXT_WIDTH

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "copied")


@pytest.fixture
def files(tmp_path, other_model, monkeypatch):
    """A file of every kind, whole or not; the paths are as short as a job's, from here."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("lora", 32), ("wide_lora", 99)):
        lora = {f"{TO_Q}.lora_down.weight": torch.ones(4, width)}
        save_file(lora | {f"{TO_Q}.lora_up.weight": torch.ones(32, 4)}, f"{name}.safetensors")
    for name, width in (("word", TEXT_WIDTH), ("wide_word", 99)):
        save_file({"emb_params": torch.ones(2, width)}, f"{name}.safetensors")
        torch.save({"<word>": torch.ones(2, width)}, f"{name}.pt")
    torch.save({"<word>": torch.zeros(1, TEXT_WIDTH), "extra": RunsCode()}, "hostile.pt")
    save_file({"<word>": torch.ones(1, TEXT_WIDTH), "two": torch.ones(1)}, "two_words.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    (tmp_path / "null.safetensors").write_bytes((4).to_bytes(8, "little") + b"null and more")
    (tmp_path / "empty").mkdir()
    shutil.copytree(other_model / "vae", "vae")
    shutil.copytree(other_model / "vae", "vae_without_weights")
    (tmp_path / "vae_without_weights" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy("vae/diffusion_pytorch_model.safetensors", "vae.safetensors")
    write_checker(tmp_path / CHECKER)
    return tmp_path


def write_checker(folder):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 32}
    config = CLIPConfig(vision_config=vision, text_config={}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder)


def find(path, **extras):
    return find_model.find(str(path), None, "", Extras(**extras))


def load(path, **extras):
    return loading.load(find(path, **extras), Build("cpu", "float32"))


def beside(key, path):
    """Return what a job says that names `path` at `key`."""
    return {
        "model.loras.1.path": {"loras": (("lora.safetensors", 1.0), (path, 1.0))},
        "model.embeddings.1.path": {"embeddings": (("word.pt", "<a>"), (path, "<b>"))},
        "model.vae": {"vae": path},
        "safety.checker": {"checker": path},
    }[key]


LORA, WORD, VAE = "model.loras.1.path", "model.embeddings.1.path", "model.vae"
FILE = "must be a file here that ends in .*Fetch it first; a hub id will not do"
FOLDER = "must be a folder here with config.json and weights.*a hub id will not do"
UNREADABLE = "cannot be read as weights"


@pytest.mark.parametrize(
    ("key", "path", "reason"),
    [
        (LORA, "missing.safetensors", FILE),
        (LORA, "someone/some-lora", FILE),
        (LORA, "empty", FILE),
        (LORA, "word.pt", FILE),
        (LORA, "vae.safetensors", "holds no LoRA"),
        (LORA, "torn.safetensors", UNREADABLE),
        (LORA, "null.safetensors", UNREADABLE),
        (WORD, "missing.pt", FILE),
        (WORD, "sd-concepts-library/cat-toy", FILE),
        (WORD, "torn.pt", UNREADABLE),
        (WORD, "hostile.pt", "its pickle would run posix.system, so it was not opened"),
        (VAE, "missing.safetensors", FILE),
        (VAE, "stabilityai/sd-vae-ft-mse", FILE),
        (VAE, "torn.safetensors", UNREADABLE),
        (VAE, "empty", FOLDER),
        (VAE, "vae_without_weights", FOLDER),
        ("safety.checker", "CompVis/stable-diffusion-safety-checker", FOLDER),
        ("safety.checker", "empty", FOLDER),
    ],
)
def test_what_is_no_file_of_its_kind_is_refused_before_anything_is_loaded(
    tiny_model, files, key, path, reason
):
    with pytest.raises(ModelError, match=rf"^{key} = .*{path}.*{reason}") as refused:
        find(tiny_model, **beside(key, path))
    assert "\n" not in str(refused.value)
    assert not (files / "OWNED").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")  # of the second LoRA, which is meant
@pytest.mark.parametrize(
    ("key", "path"),
    [
        (LORA, "wide_lora.safetensors"),
        (WORD, "wide_word.safetensors"),
        (WORD, "wide_word.pt"),
        (WORD, "two_words.safetensors"),
        (VAE, "lora.safetensors"),
        (VAE, CHECKER),
        ("safety.checker", "vae"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line_that_names_it(
    tiny_model, files, key, path
):
    with pytest.raises(ModelError, match=rf"^{key} = .*{path}.*cannot be loaded") as refused:
        load(tiny_model, **beside(key, path))
    assert "\n" not in str(refused.value)


def test_a_hostile_embedding_that_slipped_past_the_look_is_not_run_by_loading(tiny_model, files):
    extras = Extras(embeddings=(("hostile.pt", "<b>"),), checker=None)
    model = ModelFiles("folder", str(tiny_model), None, "", extras)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load(model, Build("cpu", "float32"))
    assert not (files / "OWNED").exists()


def unnoticed(model, changed):
    """Return which of these files can change without the hash that names the model changing."""
    before, missed = find_model.sha256(model), []
    for file in changed:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        missed += [str(file)] if find_model.sha256(model) == before else []
        file.write_bytes(content)
    assert find_model.sha256(model) == before
    return missed


def inside(*folders):
    return [file for folder in folders for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize("vae", ["vae", "vae.safetensors"])
def test_sha256_follows_every_file_beside_the_model(tiny_model, files, vae):
    loras, embeddings = (
        (("lora.safetensors", 1.0),),
        (("word.pt", "<a>"), ("word.safetensors", "<b>")),
    )
    tiny.write_file(tiny_model, files / "model.safetensors")
    shutil.copytree(tiny_model, files / "copied")
    named = [files / name for name in ("lora.safetensors", "word.pt", "word.safetensors")]
    named += inside(files / vae) or [files / vae]
    named += inside(files / CHECKER)
    own = inside(*(files / "copied" / part for part in (*PARTS, "tokenizer", "scheduler")))
    for path, extra in {"copied": own, "model.safetensors": [files / "model.safetensors"]}.items():
        model = find(path, vae=vae, checker=CHECKER, loras=loras, embeddings=embeddings)
        assert unnoticed(model, [*named, *extra]) == []
        assert set(named) <= set(find_model.hashed(model))


def test_sha256_follows_every_file_of_the_models_own_checker(copied, files):
    shutil.copytree(files / CHECKER, copied / CHECKER)
    model = find(copied)
    assert model.extras.checker == find_model.OWN
    assert unnoticed(model, inside(copied / CHECKER)) == []
    unchecked = find(copied, checker=None)
    assert len(unnoticed(unchecked, inside(copied / CHECKER))) == 2  # as they are not loaded


def test_the_built_in_models_sha256_is_of_its_files_and_those_beside_it(files):
    model = find("builtin:shapes", loras=(("lora.safetensors", 1.0),))
    own = find_model.hashed(find("builtin:shapes"))
    assert {file.parent.name for file in own} == {"tokenizer", "scheduler", *PARTS}
    assert find_model.hashed(model) == [files / "lora.safetensors", *own]
    assert unnoticed(model, [files / "lora.safetensors"]) == []


@pytest.mark.parametrize("vae", ["vae", "vae.safetensors"])
def test_files_beside_the_model_load_from_any_folder_in_the_dtype_asked_for(
    tiny_model, files, monkeypatch, vae
):
    loras, embeddings = (("lora.safetensors", 0.5),), (("word.pt", "<word>"),)
    model = find(tiny_model, vae=vae, checker=CHECKER, loras=loras, embeddings=embeddings)
    monkeypatch.chdir("/")  # as an actor may stand elsewhere
    loaded = loading.load(model, Build("cpu", "bfloat16"))
    assert loaded.has_embeddings
    parts = [loaded.checker._checker, *(getattr(loaded, part) for part in PARTS)]
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}


def add_variant(folder, other_model, *, keep_plain):
    """Add the other model's weights as the fp16 ones."""
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        shutil.copy(other_model / part / file.name, file.with_suffix(".fp16.safetensors"))
        if not keep_plain:
            file.unlink()


def test_a_variant_that_is_the_only_one_is_found_unasked(copied, other_model):
    add_variant(copied, other_model, keep_plain=False)
    found = find(copied)
    assert found.extras.variant == "fp16"
    assert same(load(copied), StableDiffusionPipeline.from_pretrained(other_model))
    assert unnoticed(found, copied.rglob("*.fp16.safetensors")) == []


def test_of_several_variants_the_one_asked_for_is_loaded(copied, tiny_model, other_model):
    add_variant(copied, other_model, keep_plain=True)
    assert same(load(copied), StableDiffusionPipeline.from_pretrained(tiny_model))
    fp16 = StableDiffusionPipeline.from_pretrained(copied, variant="fp16")
    assert same(load(copied, variant="fp16"), fp16)
    assert same(fp16, StableDiffusionPipeline.from_pretrained(other_model))
    plain, asked = find(copied), find(copied, variant="fp16")
    assert find_model.sha256(plain) != find_model.sha256(asked)
    assert len(unnoticed(plain, copied.rglob("*.fp16.safetensors"))) == len(PARTS)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(copied, other_model):
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


def test_a_variant_of_what_has_none_is_refused(tiny_model, tmp_path):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    for path in ("builtin:shapes", tmp_path / "model.safetensors"):
        with pytest.raises(ModelError, match=r"model.variant = 'fp16'"):
            find(path, variant="fp16")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("in_channels", 9, "in_channels 9"), ("time_cond_proj_dim", 16, "time_cond_proj_dim 16")],
)
def test_a_unet_that_takes_more_is_refused(copied, name, value, words):
    config = UNet2DConditionModel.load_config(copied / "unet")
    UNet2DConditionModel.from_config({**config, name: value}).save_pretrained(copied / "unet")
    reason = f"model.path = .*copied': its UNet takes more than text and latents .*{words}"
    with pytest.raises(ModelError, match=reason):
        load(copied)


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "conv_in.weight"), ("vae", "conv_in.bias"), ("text_encoder", "norm.bias")],
)
def test_a_folder_whose_weights_lack_a_tensor_is_refused_and_not_made_up(copied, part, name):
    (file,) = (copied / part).glob("*.safetensors")
    whole = load_file(file)
    save_file(
        {key: w for key, w in whole.items() if not key.endswith(name)}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"model.path = .*copied': cannot be loaded"):
        load(copied)


@pytest.mark.parametrize(
    "lacks", ["first_stage_model.", "cond_stage_model.", "model.diffusion_model.out."]
)
def test_a_single_file_that_lacks_a_part_is_refused(tiny_model, tmp_path, lacks):
    file = tmp_path / "model.safetensors"
    tiny.write_file(tiny_model, file)
    save_file({key: w for key, w in load_file(file).items() if not key.startswith(lacks)}, file)
    with pytest.raises(ModelError, match=r"model.path = .*model.safetensors': cannot be loaded"):
        loading.load(find_model.find(str(file), None, str(tiny_model)), Build("cpu", "float32"))
