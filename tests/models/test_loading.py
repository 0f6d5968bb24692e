"""Models in every layout, and what is no model."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.loading import Build
from tests import tiny


def weights(model):
    return {
        f"{name}.{key}": value
        for name in find_model.PARTS
        for key, value in getattr(model, name).state_dict().items()
    }


def same(one, two) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def load(path, config="", revision=None, dtype="float32"):
    return loading.load(find_model.find(str(path), revision, str(config)), Build("cpu", dtype))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_loads_the_weights_of_the_folder_it_was_made_from(
    tiny_model, tmp_path, model, suffix
):
    file = tmp_path / f"model.{suffix}"
    tiny.write_file(tiny_model, file)
    loaded = load(file, config=tiny_model)
    assert same(loaded, model)
    assert loaded.scheduler_config == model.scheduler_config


def test_hub_id_loads_the_commit_that_the_hubs_cache_holds(tiny_model, tmp_path, model):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    probe = (
        "from sdbatch.engine import checkpoint, loading; import torch;"
        "files = find_model.find('someone/tiny', None, '');"
        "loaded = loading.load(files, loading.Build('cpu', 'float32'));"
        "print(files.kind, files.revision, loaded.unet.conv_in.weight.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["hub", commit, str(model.unet.conv_in.weight.sum().item())]


def test_weights_load_in_the_dtype_asked_for(tiny_model):
    assert load(tiny_model, dtype="bfloat16").unet.dtype == torch.bfloat16


def test_sha256_follows_the_weights(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    one, two = (find_model.find(str(path), None, "") for path in (tiny_model, tmp_path / "copy"))
    assert find_model.sha256(one) == find_model.sha256(two)
    with (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert find_model.sha256(one) != find_model.sha256(two)


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch OWNED",))


def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {key: torch.zeros(1)}, "extra": RunsCode()}, "model.ckpt")
    with pytest.raises(
        ModelError, match=r"model.ckpt: its pickle would run posix.system.*safetensors"
    ):
        find_model.find("model.ckpt", None, "")
    assert not (tmp_path / "OWNED").exists()


def test_pickle_that_slipped_past_the_look_is_not_run_by_loading(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": RunsCode()}, "model.ckpt")
    extras = find_model.Extras(ema=False, checker=None)  # so that its names are not looked at
    files = find_model.ModelFiles("file", "model.ckpt", None, str(tiny_model), extras)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load(files, Build("cpu", "float32"))
    assert not (tmp_path / "OWNED").exists()


def test_what_is_no_model_is_refused_with_the_way_out(tmp_path, tiny_model):
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
        "junk.safetensors": "cannot be read as weights",
        "text.txt": "must end in .safetensors or .ckpt",
        "other.ckpt": "holds no Stable Diffusion UNet",
        "missing/folder/deep": "no such file or folder",
    }
    for name, reason in cases.items():
        with pytest.raises(ModelError, match=reason):
            find_model.find(str(tmp_path / name), None, "")
    with pytest.raises(ModelError, match="the only model built in is builtin:shapes"):
        find_model.find("builtin:dogs", None, "")
    with pytest.raises(ModelError, match="only a hub id has one"):
        find_model.find(str(tiny_model), "main", "")
    with pytest.raises(ModelError, match="the hub gave none"):
        find_model.find("no-such/model", None, "")


def test_broken_weights_are_refused_in_one_line(tmp_path, tiny_model):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"model.path = .*broken.*cannot be loaded"):
        load(broken)


def test_weights_that_cannot_be_read_are_refused_in_one_line(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "copy")
    files = find_model.find(str(tmp_path / "copy"), None, "")
    (tmp_path / "copy" / "unet" / "config.json").unlink()
    (tmp_path / "copy" / "unet" / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"model.path = .*copy: cannot be read"):
        find_model.sha256(files)
