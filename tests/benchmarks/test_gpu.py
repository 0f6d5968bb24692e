"""benchmarks/gpu.py: its plan of seconds, its faults, and how it rounds diffusers' pictures."""

import shutil
import time

import numpy as np
import pytest
import torch

from benchmarks import oracle

GB_A_ROW, GB_AN_IMAGE = 0.068, 0.4  # peaks of a UNet call and of a decoding, float16, 512x512
WEIGHTS_GB = 2 * 2.1 + 4.3  # two models in float16, one in float32


@pytest.fixture
def bench(script):
    return script("bench")


def test_all_default_parts_are_expected_to_fit_eight_minutes_of_an_h100(script, bench):
    gpu = script("gpu")
    seconds = [gpu.expected_s(part, bench.FULL) for part in gpu.PARTS if part.by_default]
    assert gpu.IMPORTS_S + sum(seconds) < gpu.SECONDS == 8 * 60


def test_what_compiles_comes_last_and_compiled_diffusers_alone(script):
    gpu = script("gpu")
    assert [part.name for part in gpu.PARTS if part.compiled] == [p.name for p in gpu.PARTS[-2:]]
    assert [part.name for part in gpu.PARTS if not part.by_default] == ["compiled diffusers"]


def test_no_call_needs_more_than_24_gb(bench):
    rows = max(*bench.FULL.rows, *bench.FULL.lanes)
    peak = max(rows * GB_A_ROW, max(bench.FULL.batches) * GB_AN_IMAGE)
    assert WEIGHTS_GB + peak < 24


def test_few_steps_have_128_images_and_diffusers_full_batches(bench):
    assert bench.FULL.steps[-1] == 4
    assert bench.FULL.images[-1] >= 128
    for images in bench.FULL.images:
        assert all(images % batch == 0 for batch in bench.FULL.batches)


def test_a_part_that_fails_is_named_and_the_others_go_on(script, bench, tmp_path, capfd):
    def fail(_):
        raise RuntimeError("no kernel for this card")

    def add(shared):
        shared.found.add("second", {"rate": 1})

    parts = [
        bench.Part("first", fail, lambda _: bench.Work(), 0),
        bench.Part("second", add, lambda _: bench.Work(), 0),
    ]
    shared = bench.Bench(bench.SMALL, script("findings").Findings(tmp_path / "found"))
    assert script("gpu").measure(shared, parts, None) == ["first"]
    written = (tmp_path / "found.md").read_text()
    assert "## first: failed\n\n- RuntimeError: no kernel for this card" in written
    assert "## second\n\n- rate: 1" in written


def test_a_part_that_would_not_end_in_time_is_left_out_with_its_command(script, bench, capfd):
    gpu = script("gpu")
    parts = [bench.Part("long", pytest.fail, lambda _: bench.Work(), 100)]
    shared = bench.Bench(bench.SMALL, script("findings").Findings(None))
    left = 50 + gpu.IMPORTS_S + time.monotonic() - gpu.STARTED
    assert gpu.measure(shared, parts, left) == []
    assert "100 s are expected" in shared.found.values["long"]["not measured"]
    assert '--part "long"' in shared.found.values["long"]["not measured"]


def test_a_slower_card_is_expected_to_take_longer(script, bench):
    gpu = script("gpu")
    part = next(part for part in gpu.PARTS if part.name == "peers")
    half = gpu.expected_s(part, bench.FULL, gpu.CEILING / 2)
    assert half - part.fixed_s == pytest.approx(
        2 * (gpu.expected_s(part, bench.FULL) - part.fixed_s)
    )


def test_diffusers_pictures_are_rounded_as_diffusers_does_it(script, bench):
    shared = bench.Bench(bench.SMALL, script("findings").Findings(None))
    model, (request,) = shared.model("NHWC"), shared.requests(1, 1)
    sides = script("sides")
    pipe = oracle.pipeline(model)
    drawn = sides.draw_alike(pipe, model, [request])
    floats = pipe(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=[torch.Generator().manual_seed(request.seed)],
        output_type="np",
    ).images
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, oracle.counts(floats))


def test_slices_and_algorithms_are_of_one_side_alone(script, bench, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as a run has it
    shared = bench.Bench(bench.SMALL, script("findings").Findings(None))
    model = shared.model("NHWC")
    script("sides").Diffusers(model, 2, sliced=True).draw(shared.requests(2, 2))
    assert model.vae.use_slicing is False
    assert torch.backends.cudnn.deterministic is True


def test_a_cpu_rows_bits_do_not_depend_on_its_place(script, bench):
    shared = bench.Bench(bench.SMALL, script("findings").Findings(None))
    found = script("calls").placed(shared.model("NHWC"), 4, bench.SMALL.pixels)
    assert found["rows that differ, and by how much"] == {}
    assert {"denoiser", "decoder"} <= found.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_the_parts_that_compile_run_on_a_cpu(script, bench):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here, which torch.compile needs on a CPU")
    gpu = script("gpu")
    shared = bench.Bench(bench.SMALL, script("findings").Findings(None))
    assert gpu.measure(shared, [part for part in gpu.PARTS if part.compiled], None) == []
    assert shared.found.values["engine, plain and compiled"]
    assert shared.found.values["compiled diffusers"]
