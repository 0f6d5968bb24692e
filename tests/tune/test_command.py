"""From a model to a choice that is kept: on a CPU, and in the order of a GPU."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sdbatch import cores, registry, resolve, tuned
from sdbatch.cli import main
from sdbatch.engine.request import Request
from sdbatch.errors import JobError, ModelError, StorageError
from sdbatch.job import Model, Safety
from sdbatch.models import find_model
from sdbatch.tune import command, processes
from sdbatch.tune.bench import Bench, Variant
from sdbatch.tune.command import Options, parse_size, tune
from sdbatch.tune.processes import CallError
from tests import flow_family
from tests.gpus import install
from tests.tune import pretend_gpu

MIB = 2**20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tune"


@pytest.fixture
def shown():
    return []


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small model that is quick to measure."""
    flow_family.register(monkeypatch)
    flow_family.write_folder(tmp_path / "flow")
    return str(tmp_path / "flow")


@pytest.fixture
def tune_for(model, shown):
    def run(**options):
        given = {"model": model, "size": "16", "device": "cpu", "seconds": 60.0}
        return tune(Options(**{**given, **options}), shown.append)

    return run


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_cpu_is_tuned_and_a_job_uses_what_was_found(
    tune_for, shown, make_job, model, monkeypatch, bfloat16
):
    monkeypatch.setattr(cores, "have_bfloat16", lambda: bfloat16)
    entry = tune_for()
    tried = "\n".join(line["variant"] for line in entry.measured)
    for words in ("channels_last", "contiguous", "4 lanes", "decode 1 image", "float32"):
        assert words in tried
    assert ("bfloat16" in tried) == bfloat16
    assert all(line["ms"] > 0 and line["gb"] is None for line in entry.measured)
    assert "rows: their bits depend neither on place nor on neighbours." in shown
    assert shown[-1].endswith(str(entry.key.file))

    size = {"height": 16, "width": 16}
    files, job = resolve.find_model(make_job(model=model, sampling=size))
    found = resolve.resolve(job, files, 0, find_model.sha256(files))
    assert "by tune of" in found.lanes_by
    assert found.job.engine.model_dump().items() >= vars(entry.choice).items()
    json.dumps(entry.measured)


def test_a_rewrite_whose_package_is_missing_does_not_end_the_tuning(tiny_model, monkeypatch, shown):
    monkeypatch.delitem(sys.modules, "sdbatch.models.sd1.group_norm", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    request = Request(prompt="a dog", height=64, width=64)
    bench = Bench(
        find_model.find_model(Model(path=str(tiny_model)), Safety()), request, shown.append
    )
    plain = Variant("cpu", "float32", lanes=2, channels_last=True)
    assert bench.denoiser(replace(plain, rewrites=("group_norm_silu",))) is None
    assert "cannot run: engine.rewrites = 'group_norm_silu': triton is not" in shown[0]
    assert bench.denoiser(plain) > 0


def test_a_job_file_is_tuned_with_its_model_size_and_dtype(tune_for, tiny_model, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(
        f"prompts: {{rows: [{{prompt: a}}]}}\n"
        f"model: {{path: {tiny_model}, vae: {tiny_model}/vae}}\n"
        f"sampling: {{height: 16, width: 24}}\nengine: {{dtype: float32}}\n"
        f"output: {{path: {tmp_path}/out}}\n"
    )
    key = tune_for(model=str(file), size=None, seconds=1).key
    assert (key.height, key.width, key.dtype) == (16, 24, "float32")
    assert key.model != tune_for(model=str(tiny_model), size="24x16", seconds=1).key.model


def test_without_time_the_rule_is_measured_alone(tune_for, shown):
    entry = tune_for(seconds=0.0)
    assert len([line for line in entry.measured if "decode" not in line["variant"]]) == 1
    assert entry.choice.lanes == 8
    assert "rows: not checked: no time is left; --seconds gives more time." in shown


def test_a_variant_that_cannot_run_is_a_line_and_out(tune_for, shown, monkeypatch):
    def of_contiguous(bench, build, load=Bench.family):
        if not build.channels_last:
            raise RuntimeError("no kernel\nfor it")
        return load(bench, build)

    monkeypatch.setattr(cores, "have_bfloat16", lambda: False)
    monkeypatch.setattr(Bench, "family", of_contiguous)
    entry = tune_for()
    assert entry.choice.channels_last is True
    (line,) = [line for line in shown if "contiguous" in line]
    assert line.endswith(" cannot run: no kernel for it")


def test_ctrl_c_keeps_nothing_and_says_so(model, monkeypatch, capfd, cache):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "denoiser", interrupted)
    done = CliRunner().invoke(main, ["tune", model, "--size", "16", "--device", "cpu"])
    assert done.exit_code == 1
    assert "Interrupted: nothing is kept." in capfd.readouterr().err
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "height", "width"), [("512", 512, 512), ("512x768", 768, 512), (" 64X8 ", 8, 64)]
)
def test_a_size_is_width_by_height_or_one_side(text, height, width):
    assert parse_size(text) == (height, width)


@pytest.mark.parametrize("text", ["", "x", "512x", "x512", "0x8", "-8", "8x8x8", "512 768", "8.5"])
def test_a_size_that_is_none_is_an_error(text):
    with pytest.raises(JobError, match=r"^--size = '.*': must be WIDTHxHEIGHT or one number"):
        parse_size(text)


def test_a_size_that_cannot_be_drawn_is_an_error(tune_for, monkeypatch):
    with pytest.raises(JobError, match=r"^sampling.height = 100: must be a multiple of 8"):
        tune_for(size="64x100")
    monkeypatch.setattr(flow_family, "LIMITS", replace(flow_family.LIMITS, multiple_of=64))
    words = r"^--size = 96x64: width = 96: must be a multiple of 64 for this model. Such as 512"
    with pytest.raises(JobError, match=words):
        tune_for(size="96x64")


def test_a_model_that_is_none_is_an_error(tune_for, tmp_path):
    with pytest.raises(ModelError, match=r"^model.path = 'no model': no such file or folder"):
        tune_for(model="no model")
    with pytest.raises(JobError, match=r"nothing.yaml"):
        tune_for(model=str(tmp_path / "nothing.yaml"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_a_cpu(
    tune_for, tmp_path, monkeypatch, device
):
    install(tmp_path, monkeypatch, "NVIDIA L4, 23034, 580")
    with pytest.raises(ModelError, match=r"^engine.device = 'cuda': torch .* driver"):
        tune_for(device=device)


def test_a_cache_that_cannot_be_written_is_an_error_before_anything_is_measured(
    tune_for, shown, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="must be a folder that can be written"):
        tune_for()
    assert shown == []


@pytest.fixture
def pretend(model, tmp_path, monkeypatch):
    """A GPU of 8 GiB that computes on the CPU, and a model for it; see pretend_gpu."""
    monkeypatch.setitem(registry.FAMILIES, flow_family.PIPELINE, pretend_gpu.__name__)
    limits = replace(flow_family.LIMITS.capacity["cuda"], most=512)
    monkeypatch.setitem(flow_family.LIMITS.capacity, "cuda", limits)
    install(tmp_path, monkeypatch, "NVIDIA Pretend, 8192, 580.1")
    values = {
        "get_device_capability": (9, 0),
        "get_arch_list": [],
        "get_device_name": "NVIDIA Pretend",
        "get_device_properties": SimpleNamespace(total_memory=8192 * MIB),
        "max_memory_reserved": 1024 * MIB,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.tunable, "enable", lambda on: None)
    monkeypatch.setattr(pretend_gpu, "faults", set())
    # a new process has none of these
    monkeypatch.setattr(processes, "call", lambda function, *given, seconds: function(*given))
    return model


def test_a_gpu_is_tuned_in_lanes_kernels_layout_and_compiling(tune_for, shown, pretend):
    entry = tune_for(model=pretend, device="auto", size="16")
    text = "\n".join(shown)
    for words in (
        "NVIDIA Pretend, driver 580.1; ",
        "attention cudnn",
        "attention flash",
        "attention efficient",
        "contiguous",
        "compiled",
        "decode 1 image",
        "rows: their bits depend neither on place nor on neighbours.",
        "rows: the same bits in a second process.",
    ):
        assert words in text
    assert all(line["gb"] == 1.074 for line in entry.measured if line["ms"] is not None)
    assert (entry.key.device, entry.key.driver) == ("NVIDIA Pretend", "580.1")
    assert entry.key.dtype == entry.choice.dtype == "float16"
    assert entry.choice.lanes <= pretend_gpu.MOST_ROWS
    assert entry.choice.split_k is True
    assert tuned.read() == ([entry], [])


@pytest.mark.slow
def test_memory_that_ends_ends_the_lanes_and_is_a_line(tune_for, shown, pretend, monkeypatch):
    monkeypatch.setattr(pretend_gpu, "MOST_ROWS", 4)
    entry = tune_for(model=pretend, device="cuda", size="16")
    assert entry.choice.lanes <= 4
    assert next(line for line in shown if line.startswith("8 lanes")).endswith(" out of memory")


@pytest.mark.slow
def test_variants_that_leave_too_little_memory_are_measured_and_not_chosen(
    tune_for, shown, pretend, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7000 * MIB)
    words = r"^engine.lanes = 128 and fewer: none could be drawn here.* Try a smaller --size"
    with pytest.raises(ModelError, match=words):
        tune_for(model=pretend, device="cuda", size="16")
    assert any(line.startswith("2 lanes") and line.endswith(" 7.34") for line in shown)
    assert tuned.read() == ([], [])


@pytest.mark.slow
def test_rows_that_leak_by_split_k_turn_it_off(tune_for, shown, pretend):
    pretend_gpu.faults.add("split_k")
    entry = tune_for(model=pretend, device="cuda", size="16")
    assert entry.choice.split_k is False
    text = "\n".join(shown)
    assert "rows: " in text
    assert "of the denoiser differ when other neighbours, by at most" in text
    off = "rows, with engine.split_k: false"
    assert f"{off}: their bits depend neither on place nor on neighbours." in shown
    assert f"{off}: the same bits in a second process." in shown
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction is True


@pytest.mark.slow
def test_rows_that_leak_anyway_are_said(tune_for, shown, pretend):
    pretend_gpu.faults.add("always")
    assert tune_for(model=pretend, device="cuda", size="16").choice.split_k is True
    assert shown[-2].startswith("Images are not exact on this device")


@pytest.mark.slow
def test_a_second_process_with_other_bits_turns_split_k_off(tune_for, shown, pretend, monkeypatch):
    calls = []

    def call(function, *given, seconds):
        result = function(*given)
        calls.append(given)
        first_check = function is command._check and given[-1]
        return (result[0], {"denoiser": str(len(calls))}) if first_check else result

    monkeypatch.setattr(processes, "call", call)
    assert tune_for(model=pretend, device="cuda", size="16").choice.split_k is False
    assert "rows: OTHER bits in a second process." in shown
    assert "rows, with engine.split_k: false: the same bits in a second process." in shown


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_said(tune_for, shown, pretend, monkeypatch):
    def too_long(*_, seconds):
        raise CallError("not done within 5 s")

    monkeypatch.setattr(processes, "call", too_long)
    choice = tune_for(model=pretend, device="cuda", size="16").choice
    assert (choice.compile, choice.split_k) == (False, True)
    assert "rows: not checked: not done within 5 s." in shown


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_line_and_out(tune_for, shown, pretend):
    pretend_gpu.faults.add("compile")
    pretend_gpu.faults.add("layout")
    entry = tune_for(model=pretend, device="cuda", size="16")
    assert (entry.choice.compile, entry.choice.channels_last) == (False, True)
    assert any(
        line.endswith("compiled    cannot run: no C compiler") or "no C" in line for line in shown
    )
