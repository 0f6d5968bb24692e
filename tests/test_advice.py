"""Where a job's open values come from: what was tuned, the GPU's memory, a rule."""

from dataclasses import replace

import pytest

from sdbatch import advice, hardware, resolve, tuned
from sdbatch.batch.pipeline import find_work, prepare
from sdbatch.errors import JobError
from sdbatch.job import parse
from sdbatch.models import find_model
from sdbatch.output.record import read_record
from sdbatch.resolve import ANY_GPU
from sdbatch.storage import Store
from sdbatch.tuned import Entry
from tests import without_ray
from tests.gpus import install
from tests.test_tuned import CHOICE

H100, T4 = "NVIDIA H100 80GB HBM3, 81559, 580.1", "Tesla T4, 15360, 580.1"
GIVEN = "as the job or its output says"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def with_gpus(tmp_path, monkeypatch):
    return lambda *lines: install(tmp_path, monkeypatch, *lines)


def keep(job, device=None, **choice):
    """Keep a choice for a job and a device; by default this machine's processor."""
    files, job = resolve.find_model(job)
    key = advice.tuning_key(job, files, device or hardware.processor(), find_model.sha256(files))
    entry = Entry(key, replace(CHOICE, **choice), "2026-11-29", [])
    tuned.keep(entry)
    return entry


def resolved(job, gpus=0, types=()):
    files, job = resolve.find_model(job)
    return resolve.resolve(job, files, gpus, find_model.sha256(files), types)


def test_a_job_takes_what_was_tuned_for_its_device_model_and_size(make_job):
    entry = keep(make_job())
    found = resolved(make_job())
    assert found.engine.lanes == {ANY_GPU: 16}
    values = found.job.engine.model_dump()
    assert values.items() >= vars(CHOICE).items()
    assert values["threads"] == 1
    assert found.engine.build.attention == "math"
    assert found.lanes_by == f"16 lanes by tune of 2026-11-29 on {entry.key.device}"


@pytest.mark.parametrize("other", ["size", "model", "dtype"])
def test_a_job_of_another_size_model_or_dtype_does_not_take_it(make_job, tiny_model, other):
    keep(make_job())
    sections = {
        "size": {"sampling": {"height": 128}},
        "model": {"model": str(tiny_model)},
        "dtype": {"engine": {"dtype": "float32"}},
    }
    found = resolved(make_job(**sections[other]))
    assert found.engine.attention == "torch"
    assert found.lanes_by.startswith(f"{found.engine.most_lanes} lanes by rule, not tuned: run `")


def test_what_other_versions_have_tuned_does_not_count(make_job, monkeypatch):
    keep(make_job())
    monkeypatch.setattr(tuned, "versions", lambda: {"torch": "99"})
    assert resolved(make_job()).engine.attention == "torch"


def test_the_values_of_a_job_win_over_what_was_tuned(make_job):
    keep(make_job())
    found = resolved(make_job(engine={"lanes": 8, "compile": False, "decode_group": 3}))
    engine = found.engine
    assert (engine.lanes, engine.compile, engine.decode_group) == ({ANY_GPU: 8}, False, 3)
    assert (engine.attention, engine.split_k) == ("math", False)
    assert found.lanes_by.startswith(f"8 lanes {GIVEN}, other values by tune of 2026-11-29 on ")


def test_rewrites_that_were_tuned_are_taken_where_they_fit(make_job):
    keep(make_job(), rewrites=["graphs", "phase_upsample"])  # as of a GPU's tune
    assert resolved(make_job()).job.engine.rewrites == ["phase_upsample"]
    assert resolved(make_job(engine={"rewrites": []})).job.engine.rewrites == []


def test_a_damaged_cache_is_noted_and_the_rule_holds(make_job, caplog):
    file = keep(make_job()).key.file
    file.write_text("{")
    assert resolved(make_job()).engine.attention == "torch"
    assert f"Note: {file} is damaged and was ignored" in caplog.text


def test_an_output_keeps_its_values_whatever_was_tuned_since(make_job, tmp_path):
    job = make_job(engine={"dtype": "float32"})
    assert without_ray.draw(job).exit_code == 0
    before = read_record(Store(str(tmp_path / "out"))).job.engine
    keep(job)
    ready = prepare(job)
    assert find_work(ready).todo == []
    again = resolve.resolve(ready.plan.job, ready.model, 0, find_model.sha256(ready.model))
    assert again.job.engine == before
    assert again.lanes_by == f"32 lanes {GIVEN}"


def test_a_run_records_what_was_tuned(make_job, tmp_path):
    job = make_job()
    keep(job)
    assert without_ray.draw(job).exit_code == 0
    record = read_record(Store(str(tmp_path / "out")))
    assert record.job.engine.model_dump().items() >= vars(CHOICE).items()


@pytest.mark.parametrize(
    ("line", "lanes", "source"),
    [
        (H100, 32, "32 lanes by the memory of NVIDIA H100 80GB HBM3 (80 GiB), not tuned: run "),
        ("NVIDIA A2, 6144, 580", 16, "16 lanes by the memory of NVIDIA A2 (6 GiB), not tuned"),
        ("NVIDIA A2, [N/A], 580", 32, "32 lanes by rule, as the memory of the GPU is not known"),
    ],
)
def test_lanes_that_were_not_tuned_go_by_the_memory_of_the_gpu(
    make_job, with_gpus, line, lanes, source
):
    with_gpus(line)
    found = resolved(make_job(sampling={"height": 512, "width": 512}), gpus=1)
    assert found.engine.lanes == {ANY_GPU: lanes}
    assert found.lanes_by.startswith(source)
    assert found.lanes_by.endswith("run `sdbatch tune builtin:shapes --size 512x512`")


def test_actors_that_share_a_gpu_share_its_memory(make_job, with_gpus):
    with_gpus("NVIDIA A10, 24576, 580")
    whole = make_job(sampling={"height": 512, "width": 512})
    quarter = whole.updated(cluster=whole.cluster.updated(gpus_per_actor=0.25))
    assert resolved(whole, 1).engine.most_lanes == 32
    assert resolved(quarter, 1).engine.most_lanes == 16
    keep(whole, hardware.gpus()[0], lanes=128)
    assert resolved(whole, 1).engine.most_lanes == 128
    assert resolved(quarter, 1).engine.most_lanes == 16


def test_float32_has_half_the_lanes_where_memory_is_scarce(make_job, with_gpus):
    with_gpus("NVIDIA A10, 12288, 580")
    job = make_job(sampling={"height": 512, "width": 512}, engine={"dtype": "float32"})
    assert resolved(job, 1).engine.most_lanes == 16


def test_a_gpu_takes_what_was_tuned_on_it(make_job, with_gpus):
    with_gpus(H100)
    job = make_job()
    keep(job, hardware.gpus()[0], dtype="float16", lanes=256)
    assert resolved(job, 1, ["H100"]).engine.lanes == {ANY_GPU: 256}
    with_gpus(H100.replace("580.1", "590.2"))
    assert resolved(job, 1, ["H100"]).engine.attention == "torch"


def test_a_rewrite_that_cannot_be_compiled_is_refused_where_tuning_chose_to_compile(
    make_job, with_gpus
):
    with_gpus(H100)
    keep(make_job(), hardware.gpus()[0], dtype="float16")
    rewrites = ["graphs"]
    with pytest.raises(JobError, match=r"^engine.rewrites = 'graphs': engine.compile is true, set"):
        resolved(make_job(engine={"rewrites": rewrites}), 1, ["H100"])
    eager = resolved(make_job(engine={"rewrites": rewrites, "compile": False}), 1, ["H100"])
    assert eager.engine.rewrites == ("graphs",)


def test_another_machines_gpu_takes_what_was_tuned_on_its_type(make_job, with_gpus):
    with_gpus(H100)
    keep(make_job(), hardware.gpus()[0], dtype="float16", lanes=256)
    with_gpus("NVIDIA GeForce RTX 4090, 24564, 580")  # of the machine that drives the run
    found = resolved(make_job(), 4, ["H100"])
    assert found.engine.lanes == {ANY_GPU: 256}
    assert found.lanes_by.endswith("by tune of 2026-11-29 on NVIDIA H100 80GB HBM3")
    other = resolved(make_job(), 4, ["A100"])
    assert other.lanes_by.startswith("512 lanes by rule, as the memory of the GPU is not known")


@pytest.mark.parametrize(("here", "types"), [((H100, T4), ()), ((), ("H100", "T4")), ((T4,), "AB")])
def test_gpus_of_several_types_go_by_the_rule(make_job, with_gpus, here, types):
    with_gpus(*here)
    found = resolved(make_job(), 2, types)
    assert "lanes by rule, as the GPUs are of several types (" in found.lanes_by
    assert found.engine.most_lanes == 512


def test_a_gpu_that_nobody_names_goes_by_the_rule(make_job, with_gpus):
    with_gpus()
    assert "by rule, as the GPU is not known here, not tuned" in resolved(make_job(), 1).lanes_by


def test_a_job_that_its_model_alone_does_not_describe_is_tuned_as_a_job(make_job, tiny_model):
    vae = {"path": str(tiny_model), "vae": str(tiny_model / "vae")}
    others = {"model": vae}, {"safety": {"checker": "none"}}, {"engine": {"dtype": "float32"}}
    for other in others:
        assert "run `sdbatch tune JOB`" in resolved(make_job(**other)).lanes_by


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_of_gpus_is_an_error_on_a_cpu(make_job, kernel):
    words = rf"^engine.attention = '{kernel}': is a kernel of GPUs: must be auto, torch, flash or"
    with pytest.raises(JobError, match=words):
        resolved(make_job(engine={"attention": kernel}))
    assert resolved(make_job(engine={"attention": kernel}), gpus=1).engine.attention == kernel


def test_nothing_open_needs_neither_the_cache_nor_a_gpu(make_job, monkeypatch):
    values = resolved(make_job()).job.model_dump()
    monkeypatch.setattr(tuned, "read", None)
    monkeypatch.setattr(hardware, "gpus", None)
    assert resolved(parse(values)).lanes_by == f"32 lanes {GIVEN}"
