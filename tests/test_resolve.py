"""From a job to what draws it: nothing left open, and an engine that can draw it."""

import shutil

import pytest
import torch

from sdbatch import cores, resolve
from sdbatch.engine import cuda
from sdbatch.engine.request import Request
from sdbatch.errors import JobError, ModelError
from sdbatch.job import Model, Safety
from sdbatch.models import find_model
from sdbatch.output import identity
from sdbatch.resolve import ANY_GPU
from tests import flow_family


def resolved(job, gpus=0.0):
    files, job = resolve.find_model(job)
    return resolve.resolve(job, files, gpus, None)


@pytest.mark.parametrize(
    ("sampling", "zero_snr", "words"),
    [
        ({"sampler": "lcm"}, None, "num_inference_steps = 60: lcm takes at most 50"),
        ({"clip_skip": 9}, None, "clip_skip = 9: must be below 2"),
        ({"sampler": "pndm"}, True, "'pndm': does not work with a model of zero terminal SNR"),
    ],
)
def test_an_engine_that_cannot_draw_the_jobs_values_is_not_made(
    make_job, tiny_model, sampling, zero_snr, words
):
    job = make_job(
        model={"path": str(tiny_model), "zero_snr": zero_snr},
        sampling={"num_inference_steps": 60, **sampling},
    )
    with pytest.raises(ModelError, match=f"^sampling: the model cannot draw this: .*{words}"):
        resolved(job).make_engine(["prompt", "seed", "height", "eta"])()


@pytest.mark.parametrize(
    "column", ["sampler", "num_inference_steps", "clip_skip", "negative_prompt", "prompt_weights"]
)
def test_an_engine_is_made_if_a_column_may_replace_what_the_model_rejects(
    make_job, tiny_model, column
):
    job = make_job(
        model={"path": str(tiny_model)}, sampling={"num_inference_steps": 60, "sampler": "lcm"}
    )
    resolved(job).make_engine(["prompt", column])().close()


@pytest.mark.parametrize(
    ("bfloat16", "dtype", "channels_last"), [(False, "float32", True), (True, "bfloat16", False)]
)
def test_resolving_leaves_nothing_open_and_records_all_of_it(
    make_job, tiny_model, monkeypatch, bfloat16, dtype, channels_last
):
    monkeypatch.setattr(cores, "have_bfloat16", lambda: bfloat16)
    found = resolved(
        make_job(model={"path": str(tiny_model)}, sampling={"height": 64, "width": 64})
    )
    engine = found.engine

    assert (engine.device, engine.dtype, engine.lanes) == ("cpu", dtype, {ANY_GPU: 32})
    assert (engine.channels_last, engine.compile, engine.threads) == (channels_last, False, 1)
    assert found.job.engine.model_dump() == {
        "device": "cpu",
        "dtype": dtype,
        "lanes": 32,
        "threads": 1,
        "channels_last": channels_last,
        "compile": False,
        "attention": "torch",
        "decode_group": 4,
        "split_k": True,
        "rewrites": [],
        "fp8_linears": False,
    }
    again = resolve.resolve(found.job, found.model, 0, None)
    assert again == found


def test_a_job_keeps_the_settings_that_it_gives(make_job, tiny_model):
    given = {"device": "cuda", "dtype": "bfloat16", "lanes": {"H100": 64, "T4": 16}}
    job = make_job(model={"path": str(tiny_model)}, engine={**given, "channels_last": False})
    found = resolved(job, gpus=2)

    assert (found.engine.lanes, found.engine.most_lanes) == ({"H100": 64, "T4": 16}, 64)
    assert found.engine.channels_last is False
    assert found.job.engine.model_dump().items() >= given.items()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (2, "cuda")])
def test_the_device_is_a_gpu_where_there_is_one(make_job, tiny_model, gpus, device):
    assert resolved(make_job(model={"path": str(tiny_model)}), gpus).engine.device == device


def test_a_gpu_draws_in_float16(make_job, tiny_model):
    engine = resolved(make_job(model={"path": str(tiny_model)}), gpus=1).engine
    assert (engine.dtype, engine.channels_last) == ("float16", True)


def test_linear_layers_in_8_bits_need_a_gpu_and_bfloat16(make_job, tiny_model):
    def engine(gpus=1, **settings):
        given = {"fp8_linears": True, **settings}
        return resolved(make_job(model={"path": str(tiny_model)}, engine=given), gpus)

    found = engine()
    assert (found.engine.dtype, found.engine.build.fp8_linears) == ("bfloat16", True)
    assert found.job.engine.fp8_linears is True  # recorded, and a part of the fingerprint
    for gpus, settings, words in (
        (0, {}, "draws on cpu in bfloat16: must be on cuda in bfloat16"),
        (1, {"dtype": "float16"}, "draws on cuda in float16: must be on cuda in bfloat16"),
    ):
        with pytest.raises(JobError, match=f"^engine.fp8_linears = True: the engine {words}"):
            engine(gpus, **settings)


def test_a_cpu_draws_in_the_memory_layout_of_the_dtype_that_the_job_gives(make_job, tiny_model):
    def layout(dtype, channels_last="auto"):
        engine = {"dtype": dtype, "channels_last": channels_last}
        return resolved(make_job(model={"path": str(tiny_model)}, engine=engine)).engine

    assert layout("float32").channels_last is True
    assert layout("bfloat16").channels_last is False
    assert layout("bfloat16", channels_last=True).channels_last is True


def test_a_gpu_that_is_not_there_is_an_error(make_job, tiny_model):
    job = make_job(model={"path": str(tiny_model)}, engine={"device": "cuda"})
    with pytest.raises(JobError, match=r"^engine.device = 'cuda': the cluster has no GPU. Set cpu"):
        resolved(job)


def test_the_device_of_a_growing_cluster_must_be_given(make_job, tiny_model):
    job = make_job(model={"path": str(tiny_model)}, cluster={"actors": {"max": 4}})
    with pytest.raises(JobError, match=r"^engine.device = 'auto': the cluster grows.*Set cuda"):
        resolved(job)
    assert resolved(job, gpus=1).engine.device == "cuda"


def test_weights_with_another_hash_than_the_job_names_are_rejected(make_job, tiny_model):
    job = make_job(model={"path": str(tiny_model), "sha256": "0" * 64})
    files, job = resolve.find_model(job)
    with pytest.raises(ModelError, match=r"sha256 of its weights is abc: must be 0{64}"):
        resolve.resolve(job, files, 0, "abc")


def test_an_engine_is_not_made_from_weights_that_changed_after_they_were_hashed(
    make_job, tiny_model, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    job = make_job(model={"path": str(folder)}, sampling={"height": 64, "width": 64})
    files, job = resolve.find_model(job)
    make_engine = resolve.resolve(job, files, 0, find_model.sha256(files)).make_engine()
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ModelError, match=r"its sha256 is .* must be .*, as when the run began"):
        make_engine()


def test_an_engine_decodes_and_sums_as_the_job_says(make_job, tiny_model):
    groups = set()

    def note(module, inputs):
        if type(module).__name__ == "Decoder":
            groups.add(len(inputs[0]))

    job = make_job(
        model=str(tiny_model),
        sampling={"height": 16, "width": 16, "num_inference_steps": 2},
        engine={"decode_group": 3, "split_k": False, "lanes": 8, "dtype": "float32"},
    )
    engine = resolved(job).make_engine()()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        matmul = torch.backends.cuda.matmul
        assert matmul.allow_fp16_reduced_precision_reduction is False
        assert matmul.allow_bf16_reduced_precision_reduction_split_k is False
        request = Request(**job.sampling.model_dump(), prompt="a dog")
        for future in [engine.submit(request.updated(seed=seed)) for seed in range(6)]:
            future.result()
    finally:
        hook.remove()
        engine.close()
        cuda.allow_split_k(True)
    assert groups == {3}
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error_before_weights_are_read(
    make_job, tiny_model, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    files, job = resolve.find_model(make_job(model={"path": str(folder)}))
    make_engine = resolve.resolve(job, files, 1, find_model.sha256(files)).make_engine()
    next((folder / "unet").glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"^engine.device = 'cuda': torch .* driver"):
        make_engine()


def test_the_engine_of_a_job_has_its_bits_pinned_and_rejects_what_overrides_them(
    make_job, tiny_model, monkeypatch
):
    make_engine = resolved(make_job(model={"path": str(tiny_model)})).make_engine()
    torch.backends.cudnn.benchmark = True
    make_engine().close()
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(ModelError, match="environment ONEDNN_DEFAULT_FPMATH_MODE = 'BF16'"):
        make_engine()


def test_the_rewrites_of_a_job_are_recorded_in_one_order(make_job, tiny_model):
    def rewritten(rewrites):
        engine = {"rewrites": rewrites}
        return resolved(make_job(model={"path": str(tiny_model)}, engine=engine))

    one, other = rewritten(["text_kv", "phase_upsample"]), rewritten(["phase_upsample", "text_kv"])
    assert one.engine.build.rewrites == ("phase_upsample", "text_kv")
    assert one.job.engine.rewrites == ["phase_upsample", "text_kv"]
    assert one == other
    assert identity.fingerprint(one.job, {}) != identity.fingerprint(rewritten([]).job, {})


@pytest.mark.parametrize(
    ("sections", "gpus", "words"),
    [
        ({"engine": {"device": "cpu"}}, 0, "engine.device is cpu"),
        ({"engine": {"compile": True}}, 1, "engine.compile is true"),
        ({"model": {"loras": [{"path": "ink.pt", "name": "ink"}]}}, 1, "model.loras has names"),
    ],
)
def test_graphs_are_refused_where_they_cannot_be_captured(make_job, sections, gpus, words):
    with pytest.raises(JobError, match=rf"^engine.rewrites = 'graphs': {words}.*Leave graphs out"):
        resolve_rewritten(make_job, "graphs", sections, gpus)


def resolve_rewritten(make_job, name, sections, gpus):
    engine = {"rewrites": [name], **sections.get("engine", {})}
    job = make_job(engine=engine, model={"path": "builtin:shapes", **sections.get("model", {})})
    files = find_model.find_model(Model(path="builtin:shapes"), Safety())
    return resolve.resolve(job, files, gpus, None)


@pytest.mark.parametrize(
    ("engine", "words"),
    [({"device": "cpu"}, "engine.device is cpu"), ({"compile": True}, "engine.compile is true")],
)
def test_norms_are_joined_only_on_a_gpu_and_without_the_compiler(make_job, engine, words):
    fault = rf"^engine.rewrites = 'group_norm_silu': {words}.*Leave group_norm_silu out"
    with pytest.raises(JobError, match=fault):
        resolve_rewritten(make_job, "group_norm_silu", {"engine": engine}, 1)
    loras = {"model": {"loras": [{"path": "ink.pt", "name": "ink"}]}}
    found = resolve_rewritten(make_job, "group_norm_silu", loras, 1)
    assert found.engine.rewrites == ("group_norm_silu",)


def test_a_rewrite_is_refused_where_the_models_family_has_none(make_job, tmp_path, monkeypatch):
    flow_family.register(monkeypatch)
    flow_family.write_folder(tmp_path / "flow")
    job = make_job(model=str(tmp_path / "flow"), engine={"rewrites": ["text_kv"]})
    with pytest.raises(
        JobError, match=r"^engine.rewrites = 'text_kv': must be one of this model: "
    ):
        resolved(job)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"compile": True}, "engine.compile is true"),
        ({"rewrites": ["shared_prefix", "graphs"]}, "graphs is in the list too"),
    ],
)
def test_a_shared_prefix_is_refused_where_the_unet_is_one_call(make_job, engine, words):
    job = make_job(engine={"rewrites": ["shared_prefix"], **engine})
    files = find_model.find_model(Model(path="builtin:shapes"), Safety())
    with pytest.raises(JobError, match=rf"'shared_prefix': {words}.*Leave shared_prefix out"):
        resolve.resolve(job, files, 1, None)


def test_a_rewrite_that_does_not_exist_is_refused_with_those_that_do(make_job):
    names = "'graphs', 'group_norm_silu', 'phase_upsample', 'shared_prefix' or 'text_kv'"
    with pytest.raises(JobError, match=rf"^engine.rewrites.0 = 'faster': must be {names}"):
        make_job(engine={"rewrites": ["faster"]})
