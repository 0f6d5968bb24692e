"""The utilisation of a run's engines, from its receipts."""

from dataclasses import replace

from sdbatch.output.receipts import Receipt
from sdbatch.report.utilisation import measure_utilisation


def receipt(shard, pid=1, lanes=None, decoded_again=0, **engine):
    usage = {"seconds": 10.0, "idle_seconds": 0.0, "ticks": 100, "rows": 1600, "filled": 1600}
    facts = {"host": "a", "pid": pid, "lanes": lanes or {"16": 10}}
    facts["decoded_again"] = decoded_again
    facts["engine"] = {**usage, "shrunk": [], **engine}
    return Receipt(shard, "0123456789abcdef", "000001-run", 10, 0, {}, [], facts)


def test_an_engine_that_never_waits_and_fills_its_lanes_has_the_speed_of_a_bare_engine():
    utilisation = measure_utilisation([receipt(0)], seconds=10.0)
    assert (utilisation.speed, utilisation.idle, utilisation.filled) == (1.0, 0.0, 1.0)
    assert utilisation.lines() == [
        "  engine:      100% of the bare engine's speed (idle 0%, lanes 100% filled)"
    ]


def test_idle_time_padding_and_a_late_start_reduce_the_speed():
    earlier, latest = receipt(0, ticks=50), receipt(1, idle_seconds=2.0, filled=1200)
    utilisation = measure_utilisation([latest, earlier], seconds=16.0)
    assert (utilisation.speed, utilisation.idle, utilisation.filled) == (0.375, 0.5, 0.75)


def test_engines_of_several_actors_are_averaged():
    utilisation = measure_utilisation([receipt(0), receipt(1, pid=2, seconds=5.0)], seconds=10.0)
    assert (utilisation.speed, utilisation.idle) == (0.75, 0.25)


def test_a_lack_of_memory_is_reported_with_the_way_to_bit_equal_images():
    shrunk = ["8 lanes (OutOfMemoryError: 20 GiB)"]
    utilisation = measure_utilisation(
        [receipt(0, lanes={"16": 4, "8": 6}, shrunk=shrunk)], seconds=10.0
    )
    assert utilisation.lines()[1:] == [
        "  reduced to 8 lanes (OutOfMemoryError: 20 GiB)",
        "  the number of lanes varied: 4 with 16, 6 with 8. For bit-equal images set engine.lanes "
        "to 8 and start again with --overwrite.",
    ]


def test_images_of_several_sizes_are_drawn_in_several_numbers_of_lanes_without_a_warning():
    assert measure_utilisation([receipt(0, lanes={"16": 4, "8": 6})], 10.0).lines()[1:] == []


def test_images_that_were_decoded_again_are_counted_in_one_line_with_the_way_out():
    receipts = [receipt(0, decoded_again=4), receipt(1, decoded_again=1_200), receipt(2)]
    assert measure_utilisation(receipts, seconds=10.0).lines()[1:] == [
        "  decoded again in float32: 1,204 images, because they were not finite in engine.dtype. "
        "To decode each once, set model.vae to a VAE for that dtype, or engine.dtype to bfloat16 "
        "or float32."
    ]


def test_a_run_that_drew_nothing_has_no_utilisation():
    assert measure_utilisation([], 10.0) is None
    assert measure_utilisation([replace(receipt(0), facts={})], 10.0) is None
    assert measure_utilisation([receipt(0)], 0.0) is None
