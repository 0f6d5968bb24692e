"""LoRAs, embeddings, VAEs and weights that are not a model's own, against diffusers' own loaders.

How such files are found, hashed and refused: test_beside.py.
"""

import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from benchmarks import oracle
from sdbatch.engine.engine import Engine
from sdbatch.models import find_model
from sdbatch.models.find_model import Extras
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.loading import Build
from sdbatch.models.sd1.text import Tokenizer
from tests import tiny
from tests.models.test_loading import same, weights
from tests.tiny import TEXT_WIDTH

MOST_COUNTS = 1  # as in test_samplers.py: float32 in batches of another size, rounded to uint8
PLAIN = Build("cpu", "float32")
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK = 4
KOHYA = (("unet", UNET_LAYERS, "lora_unet_"), ("text_encoder", TEXT_LAYERS, "lora_te_text_model_"))
# Of the second LoRA, which is what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


@pytest.fixture
def draw(request_for):
    """Draw a request with an engine of its own; returns what was drawn."""

    def draw_with(model, **values):
        engine = Engine(model, lanes=8, threads=1)
        drawn = engine.submit(request_for(**values)).result()
        engine.close()
        return drawn

    return draw_with


@pytest.fixture
def drawn_as_by(draw, request_for):
    """Assert that a model draws what a pipeline of diffusers does; returns what was drawn."""

    def check(model, pipe, **values):
        drawn = draw(model, **values)
        reference = oracle.draw(pipe, request_for(**values), model.scheduler_config)
        assert difference(drawn.image, oracle.counts(reference)) <= MOST_COUNTS
        return drawn

    return check


def difference(one, two):
    return np.abs(one.astype(int) - two).max()


def load(path, *, config="", build=PLAIN, **extras):
    return loading.load(find_model.find(str(path), None, str(config), Extras(**extras)), build)


def pipeline(folder, **parts):
    pipe = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_lora(model_folder, path, seed):
    """Write a random LoRA of the UNet and the text encoder as diffusers' training scripts do."""
    pipe = pipeline(model_folder)
    layers = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, targets in (("unet", UNET_LAYERS), ("text_encoder", TEXT_LAYERS)):
            part = getattr(pipe, name)
            part.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets)))
            for key, weight in part.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.1)
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
    StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers)
    return str(path)


@pytest.fixture(scope="module")
def loras(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(tiny_model, folder / f"{seed}.safetensors", seed) for seed in (1, 2)]


def test_loras_are_fused_as_diffusers_fuses_them_at_their_weights_and_in_their_order(
    tiny_model, model, loras, draw, drawn_as_by
):
    given = tuple(zip(loras, (0.8, -0.5), strict=True))
    pipe = pipeline(tiny_model)
    for name, (file, _) in zip("ab", given, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, -0.5])
    fused = load(tiny_model, loras=given)
    drawn = drawn_as_by(fused, pipe, guidance_scale=7.5)
    assert difference(drawn.image, draw(model, guidance_scale=7.5).image) > 10 * MOST_COUNTS
    pipe.fuse_lora(adapter_names=["a", "b"])
    pipe.unload_lora_weights()
    assert same(fused, pipe)
    assert not same(load(tiny_model, loras=given[::-1]), fused)  # in the last bits
    changed = {
        key for key, weight in weights(model).items() if (weight != weights(fused)[key]).any()
    }
    assert {key.partition(".")[0] for key in changed} == {"unet", "text_encoder"}


def test_a_lora_of_weight_0_changes_nothing(tiny_model, model, loras, draw):
    none = load(tiny_model, loras=((loras[0], 0.0),))
    assert difference(draw(none).image, draw(model).image) <= MOST_COUNTS


def write_kohya(path, model, alphas):
    """Write a LoRA as kohya's sd-scripts do; return what it adds to each weight."""
    generator, file, added = torch.Generator().manual_seed(3), {}, {}
    for part, layers, prefix in KOHYA:
        for name, layer in getattr(model, part).named_modules():
            if name.endswith(layers):
                up, down = (torch.randn(n, RANK, generator=generator) for n in layer.weight.shape)
                alpha = alphas[len(added) % len(alphas)]
                added[f"{part}.{name}.weight"] = alpha / RANK * up @ down.T
                key = prefix + name.replace(".", "_")
                file |= {f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
                file[f"{key}.lora_down.weight"] = down.T.contiguous()
    save_file(file, path)
    return added


@pytest.mark.parametrize("alphas", [(2.0,), (4.0, 1.0, 8.0)], ids=["the_same", "by_layer"])
def test_a_lora_of_kohyas_layout_is_fused_by_its_alphas(tiny_model, model, tmp_path, alphas):
    added = write_kohya(tmp_path / "kohya.safetensors", model, alphas)
    fused = load(tiny_model, loras=((str(tmp_path / "kohya.safetensors"), 0.7),))
    for key, weight in weights(model).items():
        torch.testing.assert_close(weights(fused)[key], weight + 0.7 * added.get(key, 0))


EMBEDDINGS = {  # file: (vectors, how its content is made of them)
    "learned_embeds.safetensors": (1, lambda vectors: {"<old>": vectors[0]}),
    "a1111.safetensors": (3, lambda vectors: {"emb_params": vectors}),
    "learned_embeds.bin": (3, lambda vectors: {"<old>": vectors}),
    "a1111.pt": (
        1,
        lambda vectors: {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors},
            "name": "old",
            "step": 100,
        },
    ),
}


def write_embedding(path, count=3, made=lambda vectors: {"<old>": vectors}, width=TEXT_WIDTH):
    content = made(torch.randn(count, width, generator=torch.Generator().manual_seed(count)))
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return str(path)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_words_as_diffusers_reads_them(
    tiny_model, model, tmp_path, draw, drawn_as_by, name
):
    count, made = EMBEDDINGS[name]
    file = write_embedding(tmp_path / name, count, made)
    pipe = pipeline(tiny_model)
    pipe.load_textual_inversion(file, token="<style>")
    values = {"prompt": "a dog, <style> fur", "negative_prompt": "bad <style>"}
    adapted = load(tiny_model, embeddings=((file, "<style>"),))
    drawn = drawn_as_by(adapted, pipe, **values)
    assert drawn.prompt_tokens == len("adog,fur") + count
    assert difference(drawn.image, draw(model, **values).image) > 0
    without = drawn_as_by(adapted, pipe)  # a prompt without the word
    assert np.array_equal(without.image, draw(model).image)


@pytest.mark.parametrize("words", [("<style>", "bad"), ("sks", "sks2"), ("sks2", "sks")])
def test_every_word_counts_as_its_own_vectors_wherever_it_stands(tiny_model, tmp_path, words):
    files = [write_embedding(tmp_path / f"{n}.safetensors", n) for n in (2, 3)]
    adapted = load(tiny_model, embeddings=tuple(zip(files, words, strict=True)))
    tokenizer = Tokenizer(adapted.tokenizer, has_embeddings=True)
    ids = {}
    for word, count in zip(words, (2, 3), strict=True):
        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        ids[word] = adapted.tokenizer.convert_tokens_to_ids(names)
    for prompt in ("{0} {1}", "{1} {0}", "{1}", "({0}:1.2), {1} {0}"):
        text = prompt.format(*words)
        tokens = tokenizer.read(text, 0, weighted=True, chunked=False)
        found = [token for token in tokens.chunks[0].ids if token >= min(min(ids.values()))]
        assert found == [i for word in re.findall(r"<?\w+>?", text) for i in ids.get(word, [])]


@pytest.fixture(params=["folder", "original", "diffusers"])
def vae(request, other_model, tmp_path):
    """Another VAE: (path to give, folder that diffusers loads)."""
    folder = shutil.copytree(other_model / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    if request.param == "folder":  # which brings its own configuration
        AutoencoderKL.from_pretrained(folder, sample_size=48).save_pretrained(folder)
        return folder, folder
    if request.param == "diffusers":
        return file, folder
    original = {name: weight.contiguous() for name, weight in tiny._vae(load_file(file)).items()}
    save_file(original, tmp_path / "vae-ft-mse.safetensors")
    return tmp_path / "vae-ft-mse.safetensors", folder


def test_another_vae_takes_the_place_of_the_models_own(tiny_model, model, draw, drawn_as_by, vae):
    pipe = pipeline(tiny_model, vae=AutoencoderKL.from_pretrained(vae[1]))
    swapped = load(tiny_model, vae=str(vae[0]))
    assert same(swapped, pipe)
    drawn = drawn_as_by(swapped, pipe)
    assert difference(drawn.image, draw(model).image) > 10 * MOST_COUNTS


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_of_a_full_file_the_averaged_weights_are_drawn_unless_the_others_are_asked_for(
    tiny_model, other_model, tmp_path, suffix
):
    file = tmp_path / f"full.{suffix}"
    for folder in (tiny_model, other_model):
        tiny.write_file(folder, tmp_path / f"{folder.name}.safetensors")
    full, other = (load_file(tmp_path / f"{m.name}.safetensors") for m in (tiny_model, other_model))
    for key in [key for key in full if key.startswith("model.")]:
        full["model_ema." + key.removeprefix("model.").replace(".", "")] = other[key]
    full |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    torch.save({"state_dict": full}, file) if suffix == "ckpt" else save_file(full, file)
    averaged = load(file, config=tiny_model)
    plain = load(file, config=tiny_model, ema=False)
    expected = UNet2DConditionModel.from_pretrained(other_model / "unet").state_dict()
    assert all(torch.equal(expected[key], w) for key, w in averaged.unet.state_dict().items())
    assert same(plain, load(tiny_model))
    assert torch.equal(averaged.vae.decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)


def test_what_the_job_says_of_the_training_reaches_the_scheduler(tiny_model, tmp_path):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    for path in (tiny_model, tmp_path / "model.safetensors"):
        own = load(path, config=tiny_model).scheduler_config
        assert own["prediction_type"] == "epsilon"
        asked = load(path, config=tiny_model, prediction_type="v_prediction", zero_snr=True)
        assert asked.scheduler_config == {
            **own,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        plain = load(path, config=tiny_model, zero_snr=False).scheduler_config
        assert plain == {**own, "rescale_betas_zero_snr": False}


def test_channels_last_changes_no_picture(tiny_model, model, draw):
    built = load(tiny_model, build=Build("cpu", "float32", channels_last=True))
    assert built.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference(draw(built).image, draw(model).image) <= MOST_COUNTS


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, of its own
@pytest.mark.parametrize("loras_too", [False, True])
def test_compiling_changes_no_picture(tiny_model, loras, draw, loras_too):
    given = ((loras[0], 0.8),) if loras_too else ()
    eager = load(tiny_model, loras=given)
    compiled = load(tiny_model, build=Build("cpu", "float32", compile=True), loras=given)
    assert compiled.unet._orig_mod is not None  # torch's mark of what it compiles
    assert difference(draw(compiled).image, draw(eager).image) <= MOST_COUNTS
