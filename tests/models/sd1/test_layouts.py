"""Every layout that people have a model in loads the weights that it was made of."""

import json
import math
import re
import shutil

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdbatch.errors import ModelError
from sdbatch.job import Job
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models import clip_vocabulary
from sdbatch.models.find_model import BUILTIN
from sdbatch.models.sd1.text import Tokenizer
from sdbatch.resolve import find_model
from tests import tiny
from tests.models.load import find, have_same_weights, load, unhashed

VOCABULARY = BUILTIN / "sd1" / "tokenizer" / clip_vocabulary.FILE
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """The tiny model's weights in the original layout."""
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    tiny.write_file(tiny_model, file)
    return load_file(file)


def as_safetensors(weights, file):
    save_file(weights, file, {"format": "pt"})


def as_zip(weights, file):
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 7}, file)


def as_bare_zip(weights, file):
    torch.save(weights, file)


def as_old(weights, file):
    torch.save({"state_dict": weights}, file, _use_new_zipfile_serialization=False)


def with_parameters(weights, file):
    torch.save({name: torch.nn.Parameter(value) for name, value in weights.items()}, file)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (as_safetensors, "safetensors"),
        (as_safetensors, "ckpt"),  # renamed
        (as_zip, "ckpt"),
        (as_zip, "safetensors"),  # renamed
        (as_bare_zip, "ckpt"),
        (as_old, "ckpt"),
        (with_parameters, "ckpt"),
    ],
)
def test_a_checkpoint_loads_from_any_format_whatever_its_name(
    tiny_model, tmp_path, model, checkpoint, write, suffix
):
    file = tmp_path / f"model.{suffix}"
    write(checkpoint, file)
    assert have_same_weights(load(file, config=str(tiny_model)), model)


RENAMED = {
    "nai": lambda name: name.replace("transformer.text_model.", "transformer."),
    "plain": lambda name: name,
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_a_checkpoint_loads_with_the_names_of_each_tool(
    tiny_model, tmp_path, model, checkpoint, rename
):
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
    }
    weights = {rename(name): value for name, value in (checkpoint | extra).items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert have_same_weights(load(tmp_path / "model.safetensors", config=str(tiny_model)), model)


def vae_layouts(folder, checkpoint):
    """Return the weights of a VAE in each layout; `folder` has them in diffusers'."""
    diffusers = load_file(folder / "diffusion_pytorch_model.safetensors")
    prefix = "first_stage_model."
    with_prefix = {name: w for name, w in checkpoint.items() if name.startswith(prefix)}
    original = {name.removeprefix(prefix): w for name, w in with_prefix.items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        "diffusers": diffusers,
        "old diffusers": {
            re.sub(
                r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.",
                lambda found: f"{found[1]}{old[found[2]]}.",
                name,
            ): weight
            for name, weight in diffusers.items()
        },
        "original": original,
        "with its prefix": with_prefix,
        "with its loss": original
        | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)},
    }


@pytest.mark.parametrize(
    "layout", ["diffusers", "old diffusers", "original", "with its prefix", "with its loss"]
)
@pytest.mark.parametrize("suffix", ["safetensors", "vae.pt", "ckpt", "bin"])
def test_a_vae_loads_from_any_layout_and_format(
    tiny_model, other_model, checkpoint, layout, suffix, tmp_path
):
    writers = {"safetensors": as_safetensors, "vae.pt": as_zip, "ckpt": as_old, "bin": as_bare_zip}
    weights = vae_layouts(tiny_model / "vae", checkpoint)[layout]
    file = tmp_path / f"x.{suffix}"
    writers[suffix]({name: value.contiguous() for name, value in weights.items()}, file)
    loaded = load(other_model, vae=str(file)).vae.state_dict()
    expected = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


def test_a_vae_folder_of_one_variant_only_loads(tiny_model, other_model, tmp_path, model):
    shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    files = find(other_model, vae=str(tmp_path / "vae"))
    assert unhashed(files, (tmp_path / "vae").iterdir()) == []
    loaded = load(other_model, vae=str(tmp_path / "vae"))
    assert torch.equal(loaded.vae.quant_conv.weight, model.vae.quant_conv.weight)


@pytest.mark.parametrize("keep_plain", [False, True])
def test_weights_in_several_files_of_a_variant_load(copied, model, keep_plain):
    for part in ("unet", "text_encoder"):
        if not keep_plain:
            for file in (copied / part).glob("*.safetensors"):
                file.unlink()
        getattr(model, part).save_pretrained(copied / part, max_shard_size="60KB", variant="fp16")
    assert len(list((copied / "unet").glob("*fp16*-of-*.safetensors"))) > 1
    files = find(copied, variant="fp16")
    assert unhashed(files, copied.glob("*/*.fp16*safetensors")) == []
    assert files.variants == {"text_encoder": "fp16", "unet": "fp16", "vae": None}
    assert have_same_weights(load(copied, variant="fp16"), model)


def vectors(count):
    return torch.arange(count * tiny.TEXT_WIDTH).reshape(count, -1) / 100


EMBEDDINGS = {
    "a1111": lambda value: {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": value},
        "name": "x",
    },
    "a1111 safetensors": lambda value: {"emb_params": value},
    "diffusers": lambda value: {"<other>": value},
    "the word among two": lambda value: {"<word>": value, "<other>": torch.zeros(1, 32)},
    "a bare tensor": lambda value: value,
}


@pytest.mark.parametrize(
    "write",
    [as_bare_zip, lambda w, f: torch.save(w, f, _use_new_zipfile_serialization=False)],
    ids=["zip", "old"],
)
@pytest.mark.parametrize("layout", EMBEDDINGS)
def test_an_embedding_loads_from_any_layout(tiny_model, tmp_path, layout, write):
    write(EMBEDDINGS[layout](vectors(3)), tmp_path / "word.pt")
    embeddings = [Embedding(path=str(tmp_path / "word.pt"), token="<word>")]
    loaded = load(tiny_model, embeddings=embeddings)
    ids = loaded.tokenizer.convert_tokens_to_ids(["<word>", "<word>_1", "<word>_2"])
    assert torch.equal(loaded.text_encoder.get_input_embeddings().weight[ids], vectors(3))


def test_a_word_of_several_vectors_that_was_saved_with_the_model_stands_for_all(
    tiny_model, tmp_path
):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    torch.save({"<style>": vectors(3)}, tmp_path / "word.bin")
    pipe.load_textual_inversion(str(tmp_path / "word.bin"))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    tokens = Tokenizer(loaded.tokenizer).tokenize("a <style>", 0, weighted=False, chunked=False)
    ids = loaded.tokenizer.convert_tokens_to_ids(["<style>", "<style>_1", "<style>_2"])
    assert tokens.count == 1 + 3
    assert list(tokens.chunks[0].ids[2:5]) == ids
    assert torch.equal(loaded.text_encoder.get_input_embeddings().weight[ids], vectors(3))


def lora_pair():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.randn(4, 32), torch.randn(32, 4)


def write_peft(folder, **config):
    down, up = lora_pair()
    folder.mkdir()
    names = {f"base_model.model.{TO_Q}.lora_A.weight": down}
    names[f"base_model.model.{TO_Q}.lora_B.weight"] = up
    save_file(names, folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))


PEFT = {
    "alpha": ({"lora_alpha": 8}, 2.0),
    "alpha of its rank": ({}, 1.0),
    "a layer's own alpha": ({"alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    "rank-stabilised": ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(4)),
}


@pytest.mark.parametrize(("config", "scale"), PEFT.values(), ids=PEFT)
def test_a_lora_that_peft_saved_has_the_scale_of_its_configuration(
    tiny_model, tmp_path, model, config, scale
):
    write_peft(tmp_path / "lora", **config)
    path = str(tmp_path / "lora")
    for given in (path, f"{path}/adapter_model.safetensors"):
        files = find(tiny_model, loras=[Lora(path=given)])
        assert unhashed(files, (tmp_path / "lora").iterdir()) == []
    loaded = load(tiny_model, loras=[Lora(path=path)])
    down, up = lora_pair()
    before = model.unet.get_parameter(f"{TO_Q}.weight")
    after = loaded.unet.get_parameter(f"{TO_Q}.weight")
    torch.testing.assert_close(after, before + scale * (up @ down), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "safetensors"])
def test_a_lora_loads_from_a_pickle_and_from_a_folder_of_diffusers(
    tiny_model, tmp_path, model, suffix
):
    down, up = lora_pair()
    weights = {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}
    (tmp_path / "lora").mkdir()
    names = {"bin": "pytorch_lora_weights.bin", "safetensors": "pytorch_lora_weights.safetensors"}
    file = tmp_path / "lora" / names.get(suffix, f"style.{suffix}")
    (as_safetensors if suffix == "safetensors" else as_bare_zip)(weights, file)
    path = file.parent if suffix in names else file
    loaded = load(tiny_model, loras=[Lora(path=str(path))])
    before = model.unet.get_parameter(f"{TO_Q}.weight")
    after = loaded.unet.get_parameter(f"{TO_Q}.weight")
    torch.testing.assert_close(after, before + up @ down, atol=1e-5, rtol=1e-5)


def trained(tmp_path, tiny_model, checkpoint, said, **settings):
    """Return the model of the resolved job, whose file has the tensors and metadata in `said`."""
    more, metadata = said
    file = tmp_path / "model.safetensors"
    save_file(checkpoint | more, file, metadata)
    model = {"path": str(file), "config": str(tiny_model), **settings}
    job = Job.model_validate(
        {"prompts": {"rows": [{"prompt": "a"}]}, "model": model, "output": {"path": "out"}}
    )
    files, resolved = find_model(job)
    assert files.settings.prediction_type == resolved.model.prediction_type
    assert files.settings.zero_snr == resolved.model.zero_snr
    return resolved.model


NOTHING = torch.zeros(0)
TRAINED = {
    "nothing": ({}, None, {}, (None, None)),
    "v_pred": ({"v_pred": NOTHING}, None, {}, ("v_prediction", None)),
    "ztsnr": ({"v_pred": NOTHING, "ztsnr": NOTHING}, None, {}, ("v_prediction", True)),
    "v": ({}, {"modelspec.prediction_type": "v"}, {}, ("v_prediction", None)),
    "epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, {}, ("epsilon", None)),
    "the job says epsilon": (
        {"v_pred": NOTHING, "ztsnr": NOTHING},
        {"modelspec.prediction_type": "v"},
        {"prediction_type": "epsilon", "zero_snr": False},
        ("epsilon", False),
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_file_says_how_it_was_trained_unless_the_job_does(tmp_path, tiny_model, checkpoint, case):
    more, metadata, settings, found = TRAINED[case]
    model = trained(tmp_path, tiny_model, checkpoint, (more, metadata), **settings)
    assert (model.prediction_type, model.zero_snr) == found


@pytest.mark.parametrize(
    ("params", "found"), [({"parameterization": "v"}, "v_prediction"), ({"timesteps": 1000}, None)]
)
def test_the_yaml_file_next_to_a_checkpoint_says_how_it_was_trained(
    tmp_path, tiny_model, checkpoint, params, found
):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    assert trained(tmp_path, tiny_model, checkpoint, ({}, None)).prediction_type == found


def test_a_prediction_that_is_neither_is_refused(tmp_path, tiny_model, checkpoint):
    said = {"modelspec.prediction_type": "flow"}
    with pytest.raises(ModelError, match=r"modelspec.prediction_type is 'flow': must be v or eps"):
        trained(tmp_path, tiny_model, checkpoint, ({}, said))
    (tmp_path / "model.yaml").write_text("- no mapping")
    with pytest.raises(ModelError, match=r"model.yaml cannot be read as its configuration"):
        trained(tmp_path, tiny_model, checkpoint, ({}, None))


def test_what_a_file_says_reaches_the_scheduler(tmp_path, tiny_model, checkpoint):
    save_file(checkpoint | {"v_pred": NOTHING, "ztsnr": NOTHING}, tmp_path / "m.safetensors")
    config = load(tmp_path / "m.safetensors", config=str(tiny_model)).scheduler_config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "conv_in.weight"),
        ("vae", "decoder.conv_out.bias"),
        ("text_encoder", "final_layer_norm.bias"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(copied, part, name, value):
    (file,) = (copied / part).glob("*.safetensors")
    weights = load_file(file)
    (key,) = (key for key in weights if key.endswith(name))
    weights[key].view(-1)[0] = value
    save_file(weights, file, {"format": "pt"})
    reason = rf"^model.path = .*{part}.*{name} holds values that are not finite in float32"
    with pytest.raises(ModelError, match=reason):
        load(copied)


def test_a_vae_of_its_own_key_that_is_not_finite_is_refused_by_that_key(tiny_model, tmp_path):
    weights = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"][0] = math.nan
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"^model.vae = .*vae.decoder.conv_out.bias holds values"):
        load(tiny_model, vae=str(tmp_path / "vae.safetensors"))


def test_the_vocabulary_in_the_package_is_clips():
    tokenizer = clip_vocabulary.load_tokenizer(VOCABULARY)
    assert len(tokenizer) == 49408
    assert tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"]) == [49406, 49407]
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)


def test_the_configuration_in_the_package_is_of_stable_diffusion_15s_parts():
    """By the published numbers of parameters."""
    root = str(BUILTIN / "sd1")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(root, subfolder="unet")
        )
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(root, subfolder="vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(root, subfolder="text_encoder"))
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


def test_a_single_file_needs_neither_network_nor_a_configuration_of_its_own(
    tmp_path, tiny_model, checkpoint, monkeypatch, model
):
    """A package whose `sd1` is the tiny model: the way to it is the same."""
    monkeypatch.setattr("sdbatch.models.find_model.BUILTIN", tmp_path)
    shutil.copytree(tiny_model, tmp_path / "sd1")
    save_file(checkpoint, tmp_path / "model.safetensors")
    files = find(tmp_path / "model.safetensors")
    assert files.settings.config == "builtin:sd1"
    assert have_same_weights(load(tmp_path / "model.safetensors"), model)
    assert unhashed(files, (tmp_path / "sd1").glob("*/*.json")) == [
        str(file) for file in (tmp_path / "sd1").glob("safety_checker/*.json")
    ]
