"""Isolation: a row that ends its process is found and fails alone; other deaths fail no row."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from sdbatch.batch.isolation import MOST_DEATHS_ALONE, IsolatedDrawing
from sdbatch.batch.liveness import MOST_LOADS
from sdbatch.errors import ModelError
from sdbatch.stages.draw import DrawImages
from tests.batch import engines
from tests.fakes import FakeEngine
from tests.finished import encoding, requests
from tests.wait import wait_until

SECONDS = 120.0


def dogs(images, **others):
    """Return as many prompts, with `others` at their indices: _3="die"."""
    at = {int(name[1:]): prompt for name, prompt in others.items()}
    return [at.get(index, f"dog {index}") for index in range(images)]


def start(prompts, make_engine=FakeEngine, errors=None):
    """Start to draw `prompts` isolated; return the drawing and what its engines did."""
    usages = {}
    stage = DrawImages(make_engine, encoding())
    drawing = IsolatedDrawing(stage, requests(prompts, errors=errors).to_pylist(), usages)
    drawing.start()
    return drawing, usages


def draw(*arguments, **options):
    """Draw isolated; return the results."""
    drawing, _ = start(*arguments, **options)
    return drawing.done.result(SECONDS)


def draw_in_this_process(prompts):
    stage = DrawImages(FakeEngine, encoding())
    stage.open()
    drawing = stage.new_drawing(requests(prompts).to_pylist())
    drawing.start()
    return drawing.done.result(SECONDS)


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def pids(folder):
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def test_rows_are_drawn_in_a_child_as_in_the_actor(tmp_path):
    drawing, usages = start(dogs(40, _7="fail"), partial(engines.Known, tmp_path))

    assert drawing.done.result(SECONDS) == draw_in_this_process(dogs(40, _7="fail"))
    assert (drawing.drawn, drawing.failed, drawing.lanes) == (39, 1, {2: 39})
    (pid,) = pids(tmp_path)
    assert pid != os.getpid()
    assert {child: usage.ticks for child, usage in usages.items()} == {pid: 40}


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("die", "with exit code 7"),
        ("die by SIGKILL", "by signal SIGKILL"),
        ("die by SIGSEGV", "by signal SIGSEGV"),
    ],
)
def test_the_error_of_a_row_that_ends_its_process_says_how(fault, how):
    assert draw([fault]) == [{"error": f"Drawing this row ended its process {how}."}]


def test_every_row_that_ends_its_process_is_found_in_a_large_shard():
    drawing, _ = start(dogs(40, _5="die by SIGSEGV", _22="die", _35="fail"))
    results = drawing.done.result(SECONDS)

    assert {at: row["error"] for at, row in enumerate(results) if row["error"]} == {
        5: "Drawing this row ended its process by signal SIGSEGV.",
        22: "Drawing this row ended its process with exit code 7.",
        35: "ValueError: this prompt cannot be drawn",
    }
    assert (drawing.drawn, drawing.failed) == (37, 3)
    undisturbed = draw_in_this_process(dogs(40))
    assert all(row["error"] or row == undisturbed[at] for at, row in enumerate(results))


def test_a_row_with_an_error_keeps_it():
    (bad, good) = draw(["die", "a dog"], errors={0: "height = 'tall': must be a whole number"})

    assert bad == {"error": "height = 'tall': must be a whole number"}
    assert good["error"] is None


def test_no_row_fails_when_a_child_is_killed_from_outside(tmp_path):
    prompts = dogs(3, _1="stuck")
    drawing, _ = start(prompts, partial(engines.StuckOnce, tmp_path))
    wait_until((tmp_path / "began").exists)
    (pid,) = pids(tmp_path)
    os.kill(pid, signal.SIGKILL)

    assert drawing.done.result(SECONDS) == draw_in_this_process(prompts)
    assert len(pids(tmp_path)) == MOST_DEATHS_ALONE


def test_no_row_fails_when_a_child_is_killed_from_outside_as_it_draws_a_row_alone(tmp_path):
    drawing, _ = start(["stuck"], partial(engines.StuckOnce, tmp_path))
    wait_until((tmp_path / "began").exists)
    os.kill(*pids(tmp_path), signal.SIGKILL)

    assert drawing.done.result(SECONDS) == draw_in_this_process(["stuck"])


def test_a_child_that_prints_disturbs_no_result():
    assert draw(dogs(2), engines.Loud) == draw_in_this_process(dogs(2))


def test_an_engine_that_cannot_be_loaded_ends_the_shard_with_its_own_error():
    with pytest.raises(ModelError, match=r"^model.path = 'x': cannot be loaded$"):
        draw(dogs(2), engines.cannot_load)


def test_an_engine_that_cannot_go_on_ends_the_shard_with_its_own_error():
    with pytest.raises(ModelError, match=r"^engine = out of memory: must fit into it\.$"):
        draw(dogs(2, _1="refuse"), engines.Refusing)


def test_no_row_fails_when_a_child_dies_once_as_it_loads(tmp_path):
    make_engine = partial(engines.dies_while_loading, tmp_path, MOST_LOADS - 1)

    assert draw(dogs(2), make_engine) == draw_in_this_process(dogs(2))


def test_the_shard_ends_with_an_error_when_every_child_dies_as_it_loads(tmp_path):
    with pytest.raises(ModelError, match="must fit into memory twice") as caught:
        draw(dogs(2), partial(engines.dies_while_loading, tmp_path, 100))
    assert "ended with exit code 3, 3 times" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert len(pids(tmp_path)) == MOST_LOADS


def test_the_child_ends_when_the_run_stops(tmp_path):
    drawing, _ = start(["stuck"], partial(engines.Stuck, tmp_path))
    wait_until((tmp_path / "began").exists)
    drawing.give_up(ModelError("The run has stopped."))

    with pytest.raises(ModelError, match="has stopped"):
        drawing.done.result(SECONDS)
    wait_until(lambda: has_ended(*pids(tmp_path)))


def test_no_child_starts_when_the_run_has_stopped(tmp_path):
    stage = DrawImages(partial(engines.Known, tmp_path), encoding())
    drawing = IsolatedDrawing(stage, requests(dogs(2)).to_pylist(), {})
    drawing.give_up(ModelError("The run has stopped."))
    drawing.start()

    with pytest.raises(ModelError, match="has stopped"):
        drawing.done.result(SECONDS)
    assert pids(tmp_path) == []


PARENT = """
import sys
from functools import partial
from pathlib import Path
from tests.batch import engines, test_isolation

make_engine = partial(engines.Stuck, Path(sys.argv[1]))
test_isolation.start(["stuck"], make_engine)[0].done.result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    wait_until((tmp_path / "began").exists)
    parent.kill()
    parent.wait()

    wait_until(lambda: has_ended(*pids(tmp_path)))
