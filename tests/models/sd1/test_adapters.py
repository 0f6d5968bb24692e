"""LoRAs, embeddings, VAEs and settings that change a model, against diffusers' own loaders."""

import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdbatch.errors import ModelError
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.text import Tokenizer
from tests import tiny
from tests.models.load import (
    CHECKER_KEY,
    EMBEDDING_KEY,
    LORA_KEY,
    MOST_COUNTS,
    VAE_KEY,
    assert_as_diffusers,
    difference,
    draw,
    find,
    have_same_weights,
    load,
    load_with_checker,
    settings_with,
    weights,
)
from tests.tiny import TEXT_WIDTH

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK, ALPHA = 4, 16
KOHYA = (("unet", UNET_LAYERS, "lora_unet_"), ("text_encoder", TEXT_LAYERS, "lora_te_text_model_"))
# of the second LoRA, which is meant here
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


@pytest.fixture
def draw_one(request_for):
    """Draw a request with an engine of its own; returns the drawn image."""

    def draw_with(model, **values):
        return draw(model, [request_for(**values)])[0]

    return draw_with


@pytest.fixture
def draw_as(draw_one, request_for):
    """Draw a request, assert that a pipeline of diffusers draws the same; returns the image."""

    def check(model, pipe, **values):
        drawn = draw_one(model, **values)
        assert_as_diffusers(drawn, pipe, request_for(**values), model.scheduler_config)
        return drawn

    return check


def loras_of(files, weights):
    return [Lora(path=file, weight=weight) for file, weight in zip(files, weights, strict=True)]


def embeddings_of(files, words):
    return [Embedding(path=file, token=word) for file, word in zip(files, words, strict=True)]


def pipeline_of(folder, **parts):
    pipe = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_lora(model_folder, path, seed):
    """Write a random LoRA of the UNet and the text encoder as diffusers' training scripts do."""
    pipe = pipeline_of(model_folder)
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
    tiny_model, model, loras, draw_one, draw_as
):
    given = loras_of(loras, (0.8, -0.5))
    pipe = pipeline_of(tiny_model)
    for name, file in zip("ab", loras, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, -0.5])
    fused = load(tiny_model, loras=given)
    drawn = draw_as(fused, pipe, guidance_scale=7.5)
    assert difference(drawn.image, draw_one(model, guidance_scale=7.5).image) > 10 * MOST_COUNTS
    pipe.fuse_lora(adapter_names=["a", "b"])
    pipe.unload_lora_weights()
    assert have_same_weights(fused, pipe)
    assert not have_same_weights(load(tiny_model, loras=given[::-1]), fused)  # in the last bits
    changed = {
        key for key, weight in weights(model).items() if (weight != weights(fused)[key]).any()
    }
    assert {key.partition(".")[0] for key in changed} == {"unet", "text_encoder"}


def test_a_lora_of_weight_0_changes_nothing(tiny_model, model, loras, draw_one):
    fused = load(tiny_model, loras=loras_of(loras[:1], (0.0,)))
    assert difference(draw_one(fused).image, draw_one(model).image) <= MOST_COUNTS


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
    fused = load(tiny_model, loras=loras_of([str(tmp_path / "kohya.safetensors")], [0.7]))
    for key, weight in weights(model).items():
        torch.testing.assert_close(weights(fused)[key], weight + 0.7 * added.get(key, 0))


@pytest.fixture
def scaled_lora(tiny_model, tmp_path):
    """A LoRA whose scale, alpha / rank = 4, is in the file's metadata."""
    pipe = pipeline_of(tiny_model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"])
    pipe.unet.add_adapter(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, weight in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        weight_name="scaled.safetensors",
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    return str(tmp_path / "scaled.safetensors")


def test_the_scale_of_a_lora_is_that_of_its_metadata(tiny_model, scaled_lora):
    pipe = pipeline_of(tiny_model)
    pipe.load_lora_weights(scaled_lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = load(tiny_model, loras=loras_of([scaled_lora], [1.0])).unet.state_dict()
    assert all(torch.allclose(ours[name], w) for name, w in pipe.unet.state_dict().items())


def test_a_lora_that_fits_only_in_part_is_rejected(tiny_model, scaled_lora):
    content = load_file(scaled_lora)
    misfits = [name for name in content if "up_blocks" in name]
    for name in misfits:
        content[name.replace("up_blocks.", "up_blocks.7")] = content.pop(name)
    save_file(content, scaled_lora)
    reason = f"{len(misfits)} of its {len(content)} weights fit no layer"
    with pytest.raises(ModelError, match=rf"^model.loras.0.path = .*{reason}"):
        load(tiny_model, loras=loras_of([scaled_lora], [1.0]))


LAYOUTS = {  # file: (vectors, its content, made of them)
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


def write_embedding(
    path, count=3, make_content=lambda vectors: {"<old>": vectors}, width=TEXT_WIDTH
):
    content = make_content(
        torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    )
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return str(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_embeddings_are_words_as_diffusers_reads_them(
    tiny_model, model, tmp_path, draw_one, draw_as, name
):
    count, make_content = LAYOUTS[name]
    file = write_embedding(tmp_path / name, count, make_content)
    pipe = pipeline_of(tiny_model)
    pipe.load_textual_inversion(file, token="<style>")
    values = {"prompt": "a dog, <style> fur", "negative_prompt": "bad <style>"}
    adapted = load(tiny_model, embeddings=embeddings_of([file], ["<style>"]))
    drawn = draw_as(adapted, pipe, **values)
    assert drawn.prompt_tokens == len("adog,fur") + count
    assert difference(drawn.image, draw_one(model, **values).image) > 0
    without = draw_as(adapted, pipe)  # a prompt without the word
    assert difference(without.image, draw_one(model).image) == 0


@pytest.mark.parametrize("words", [("<style>", "bad"), ("sks", "sks2"), ("sks2", "sks")])
def test_every_word_counts_as_its_own_vectors_wherever_it_is(tiny_model, tmp_path, words):
    files = [write_embedding(tmp_path / f"{n}.safetensors", n) for n in (2, 3)]
    adapted = load(tiny_model, embeddings=embeddings_of(files, words))
    tokenizer = Tokenizer(adapted.tokenizer)
    ids = {}
    for word, count in zip(words, (2, 3), strict=True):
        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        ids[word] = adapted.tokenizer.convert_tokens_to_ids(names)
    for prompt in ("{0} {1}", "{1} {0}", "{1}", "({0}:1.2), {1} {0}"):
        text = prompt.format(*words)
        tokens = tokenizer.tokenize(text, 0, weighted=True, chunked=False)
        added = [token for token in tokens.chunks[0].ids if token >= min(min(ids.values()))]
        assert added == [i for word in re.findall(r"<?\w+>?", text) for i in ids.get(word, [])]


@pytest.fixture(params=["folder", "original", "diffusers"])
def vae(request, other_model, tmp_path):
    """Another VAE: the path in the job, and the folder that diffusers loads."""
    folder = shutil.copytree(other_model / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    if request.param == "folder":  # with a configuration of its own
        AutoencoderKL.from_pretrained(folder, sample_size=48).save_pretrained(folder)
        return folder, folder
    if request.param == "diffusers":
        return file, folder
    original = {name: weight.contiguous() for name, weight in tiny._vae(load_file(file)).items()}
    save_file(original, tmp_path / "vae-ft-mse.safetensors")
    return tmp_path / "vae-ft-mse.safetensors", folder


def test_another_vae_replaces_the_models_own(tiny_model, model, draw_one, draw_as, vae):
    pipe = pipeline_of(tiny_model, vae=AutoencoderKL.from_pretrained(vae[1]))
    swapped = load(tiny_model, vae=str(vae[0]))
    assert have_same_weights(swapped, pipe)
    drawn = draw_as(swapped, pipe)
    assert difference(drawn.image, draw_one(model).image) > 10 * MOST_COUNTS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, not 0.18215"),
        ({"shift_factor": 0.1}, "its shift_factor is 0.1, not None"),
        ({"latent_channels": 16}, "its latent_channels is 16, not 4"),
        (
            {
                "block_out_channels": (8, 16, 32),
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
            },
            "its latents have another size than the model's",
        ),
    ],
)
def test_a_vae_of_other_latents_than_the_models_is_rejected(tiny_model, tmp_path, change, reason):
    config = {**AutoencoderKL.load_config(tiny_model / "vae"), **change}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match=rf"^model.vae = .*{reason}"):
        load(tiny_model, vae=str(tmp_path / "vae"))


def test_a_vae_without_some_weights_is_rejected_by_its_own_key(tiny_model, tmp_path):
    shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    content = load_file(file)
    del content["decoder.conv_in.weight"]
    save_file(content, file)
    with pytest.raises(ModelError, match=r"^model.vae = .*missing weights: decoder.conv_in.weight"):
        load(tiny_model, vae=str(tmp_path / "vae"))


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")  # of the second LoRA, which is meant here
@pytest.mark.parametrize(
    ("key", "path"),
    [
        (LORA_KEY, "wide_lora.safetensors"),
        (EMBEDDING_KEY, "wide_word.safetensors"),
        (EMBEDDING_KEY, "wide_word.pt"),
        (VAE_KEY, "safety_checker"),
        (CHECKER_KEY, "vae"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_rejected_in_one_line_that_names_it(
    tiny_model, extra_files, key, path
):
    files = find(tiny_model, **settings_with(key, path))
    with pytest.raises(ModelError, match=rf"^{key} = .*{path}.*cannot be loaded") as rejected:
        load_with_checker(files)
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_of_a_full_file_the_averaged_weights_are_loaded_unless_ema_is_off(
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
    averaged = load(file, config=str(tiny_model))
    plain = load(file, config=str(tiny_model), ema=False)
    expected = UNet2DConditionModel.from_pretrained(other_model / "unet").state_dict()
    assert all(torch.equal(expected[key], w) for key, w in averaged.unet.state_dict().items())
    assert have_same_weights(plain, load(tiny_model))
    assert torch.equal(averaged.vae.decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)


def test_the_jobs_settings_of_the_training_reach_the_scheduler(tiny_model, tmp_path):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    for path in (tiny_model, tmp_path / "model.safetensors"):
        own = load(path, config=str(tiny_model)).scheduler_config
        assert own["prediction_type"] == "epsilon"
        changed = load(path, config=str(tiny_model), prediction_type="v_prediction", zero_snr=True)
        assert changed.scheduler_config == {
            **own,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        plain = load(path, config=str(tiny_model), zero_snr=False).scheduler_config
        assert plain == {**own, "rescale_betas_zero_snr": False}


def test_channels_last_changes_no_picture(tiny_model, model, draw_one):
    built = load(tiny_model, build=Build("cpu", "float32", channels_last=True))
    assert built.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference(draw_one(built).image, draw_one(model).image) <= MOST_COUNTS


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, of its own
@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1], ids=["plain", "with_a_lora"])
def test_compiling_changes_no_picture(tiny_model, loras, draw_one, count):
    given = loras_of(loras[:count], [0.8] * count)
    eager = load(tiny_model, loras=given)
    compiled = load(tiny_model, build=Build("cpu", "float32", compile=True), loras=given)
    assert compiled.unet._orig_mod is not None  # torch's mark of a compiled module
    assert difference(draw_one(compiled).image, draw_one(eager).image) <= MOST_COUNTS
