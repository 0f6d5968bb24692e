"""benchmarks/end_to_end.py and encode.py: that they draw and encode what they say."""

from sdbatch.registry import IMAGE_FORMATS


def test_the_bare_engine_draws_the_jobs_own_model(script, tmp_path):
    end_to_end, bench = script("end_to_end"), script("bench")
    job = end_to_end.job_of(tmp_path, bench.SMALL, steps=1, images=2)
    assert job.model.path == str(tmp_path / "model")
    assert job.sampling.num_inference_steps == 1
    assert end_to_end.bare_rate(job, images=2) > 0
    assert not (tmp_path / "out").exists()


def test_every_image_format_and_every_level_of_png_is_encoded(script):
    encode = script("encode")
    tried = encode.variants().values()
    assert {encoding.image_format for encoding in tried} == set(IMAGE_FORMATS)
    assert [e.compression for e in tried if e.image_format == "png"] == list(range(10))
    assert all(cost["KiB"] > 0 for cost in encode.measure(encode.photograph(), 1).values())
