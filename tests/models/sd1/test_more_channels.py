"""Models for inpainting (9 channels) and editing (8) load as what they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdbatch import resolve
from sdbatch.batch import pipeline
from sdbatch.errors import JobError, ModelError
from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.identify import EDITING, INPAINTING
from sdbatch.report.outline import make_outline
from tests import tiny
from tests.models.load import find, have_same_weights, load

USES = {9: INPAINTING, 8: EDITING}
BLACK = "data:image/png;base64,iVBORw0KGgo="
EACH = pytest.mark.parametrize("channels", USES)


@pytest.fixture(scope="session")
def folders(folders_by_use):
    """A tiny model for each use, in diffusers' layout, by its channels."""
    return {channels: folders_by_use[use] for channels, use in USES.items()}


@EACH
def test_a_folder_loads_with_the_channels_of_its_configuration(folders, channels):
    files = find(folders[channels])
    assert files.use == USES[channels]
    assert load(folders[channels]).unet.conv_in.weight.shape[1] == channels


@EACH
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_loads_with_its_own_channels_whatever_its_configuration_says(
    folders, tiny_model, tmp_path, channels, suffix
):
    file = tmp_path / f"model.{suffix}"
    tiny.write_file(folders[channels], file)
    # as the configuration in the package is, tiny_model's has 4 channels
    for config in (tiny_model, folders[channels]):
        assert find(file, config=str(config)).use == USES[channels]
        loaded = load(file, config=str(config))
        assert have_same_weights(loaded, load(folders[channels]))
        assert loaded.unet.config.in_channels == channels


def test_a_single_file_for_text_to_image_loads_by_the_configuration_of_an_inpainting_model(
    folders, tiny_model, tmp_path, model
):
    tiny.write_file(tiny_model, tmp_path / "model.safetensors")
    files = find(tmp_path / "model.safetensors", config=str(folders[9]))
    assert files.use == ""
    loaded = load(tmp_path / "model.safetensors", config=str(folders[9]))
    assert have_same_weights(loaded, model)


@EACH
def test_averaged_weights_of_more_channels_are_loaded(folders, tiny_model, tmp_path, channels):
    file = tmp_path / "model.safetensors"
    tiny.write_file(folders[channels], file)
    weights = load_file(file)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): 2 * weight
        for name, weight in weights.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(weights | averaged, file)
    one, two = (load(file, config=str(tiny_model), ema=ema).unet.conv_in for ema in (False, True))
    assert torch.equal(2 * one.weight, two.weight)


@EACH
def test_a_model_of_sd2_for_a_picture_is_that_model(folders, tmp_path, channels):
    folder = folders[channels]
    config = json.loads((folder / "unet" / "config.json").read_text())
    configs = {"unet": {**config, "cross_attention_dim": 1024}}
    files = find(folder)
    assert files.layout.base_of(configs) == "Stable Diffusion 2.x"
    assert files.layout.use_of(configs) == USES[channels]


def rows(*images):
    """Return a section `prompts` with rows of these pictures."""
    return {"path": None, "rows": [{"prompt": "make it red", "image": each} for each in images]}


@EACH
def test_a_plan_says_what_a_model_is_for(folders, make_job, channels):
    job = make_job(model={"path": str(folders[channels])}, prompts=rows(BLACK))
    assert f"model      {folders[channels]}, for {USES[channels]}\n" in make_outline(job).text()


@pytest.mark.parametrize("check", [make_outline, pipeline.prepare])
def test_a_table_without_pictures_is_refused_for_a_model_that_edits_them(folders, make_job, check):
    check(make_job(model={"path": str(folders[9])}))
    with pytest.raises(JobError, match=r"no image: must name a column of pictures, as the model"):
        check(make_job(model={"path": str(folders[8])}))


def first_layer(inputs, kind, number=0):
    """Return a network that adds to the first layer, for a model of so many channels."""
    generator = torch.Generator().manual_seed(number)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {
        "plain": {"lora_up.weight": randn(32, 2, 1, 1), "lora_down.weight": randn(2, inputs, 3, 3)},
        "full": {"diff": randn(32, inputs, 3, 3)},
    }[kind]
    return {f"lora_unet_conv_in.{key}": tensor for key, tensor in tensors.items()}


@EACH
@pytest.mark.parametrize("kind", ["plain", "full"])
def test_a_lora_of_four_channels_adds_to_the_latents_alone(
    folders, tiny_model, tmp_path, channels, kind
):
    save_file(first_layer(4, kind), tmp_path / "lora.safetensors")
    loras = [Lora(path=str(tmp_path / "lora.safetensors"))]
    plain = load(folders[channels]).unet.conv_in.weight
    delta = load(folders[channels], loras=loras).unet.conv_in.weight - plain
    own = load(tiny_model, loras=loras).unet.conv_in.weight - load(tiny_model).unet.conv_in.weight
    assert torch.allclose(delta[:, :4], own, atol=1e-5)
    assert own.abs().max() > 0.1
    assert not delta[:, 4:].any()


@EACH
@pytest.mark.parametrize("kind", ["plain", "full"])
@pytest.mark.parametrize("own", [False, True], ids=["of 4 channels", "of its own channels"])
@torch.inference_mode()
def test_a_lora_by_row_adds_to_the_first_layer_what_a_fused_one_adds(
    folders, tmp_path, channels, kind, own
):
    file = tmp_path / "lora.safetensors"
    save_file(first_layer(channels if own else 4, kind), file)
    x = torch.randn(2, channels, 8, 8)
    fused = load(folders[channels], loras=[Lora(path=str(file))])
    by_row = load(folders[channels], loras=[Lora(path=str(file), name="ink")])
    with by_row.row_loras.apply(torch.tensor([[1.0], [0.0]])):
        rows = by_row.unet.conv_in(x)
    assert torch.allclose(rows[0], fused.unet.conv_in(x)[0], atol=1e-4)
    assert torch.equal(rows[1], load(folders[channels]).unet.conv_in(x)[1])


@EACH
def test_a_lora_of_other_channels_does_not_fit(folders, tmp_path, channels):
    save_file(first_layer(5, "plain"), tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=r"must fit the layer's weight, \(32, \d, 3, 3\)"):
        load(folders[channels], loras=[Lora(path=str(tmp_path / "lora.safetensors"))])


def test_shared_prefix_is_refused_where_the_lanes_of_an_image_differ(folders, make_job):
    for channels in USES:
        job = make_job(
            model={"path": str(folders[channels])}, engine={"rewrites": ["shared_prefix"]}
        )
        files, job = resolve.find_model(job)
        build = Build("cpu", "float32", rewrites=("shared_prefix",))
        if channels == 9:
            assert resolve.resolve(job, files, 0, None).engine.rewrites == ("shared_prefix",)
            assert load(folders[channels], build).shared_prefix is not None
            continue
        reason = "'shared_prefix': the lanes of an edit differ in their picture.*Leave"
        with pytest.raises(JobError, match=reason):
            resolve.resolve(job, files, 0, None)
        with pytest.raises(ModelError, match=r"shared_prefix.* not for editing"):
            load(folders[channels], build)
