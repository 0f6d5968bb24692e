"""Progress as a line, as a bar, as plain lines, as JSON lines, and as a heartbeat."""

import io
import json
import sys
from dataclasses import replace

import pytest

from sdbatch.report.closing import Report
from sdbatch.report.progress import (
    HEARTBEAT_SECONDS,
    PROGRESS_FILE,
    REMOTE_HEARTBEAT_SECONDS,
    Bar,
    Heartbeat,
    JsonLines,
    Lines,
    Progress,
    Silent,
    duration,
    line,
)
from sdbatch.storage import Store

STARTING = Progress(planned=2000, drawn=0, failed=0, images_per_s=0.0, step="starting Ray")
LOADING = Progress(planned=2000, drawn=0, failed=0, images_per_s=0.0, step="loading the model")
HALF = Progress(planned=2000, drawn=990, failed=10, images_per_s=12.5, step="")
ALL = Progress(planned=2000, drawn=1990, failed=10, images_per_s=12.5, step="")
REPORT = Report(
    output="out/dogs",
    planned=2000,
    images=1990,
    failed=10,
    reasons={"no prompt": 10},
    drawn_now=1990,
    seconds=160.0,
    images_per_s=12.5,
    began=0.0,
)
DISPLAYS = (Bar, Lines, JsonLines)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (STARTING, "0 of 2,000 images  starting Ray"),
        (HALF, "1,000 of 2,000 images  50 %  10 failed  12.5 images/s  ETA 1:20"),
        (ALL, "2,000 of 2,000 images  100 %  10 failed  12.5 images/s  ETA 0:00"),
        (Progress(3, 2, 0, 0.0, ""), "2 of 3 images  66 %  0 failed  0.0 images/s"),
        (
            Progress(1000, 999, 0, 1.0, ""),
            "999 of 1,000 images  99 %  0 failed  1.0 images/s  ETA 0:01",
        ),
        (Progress(0, 0, 0, 0.0, ""), "0 of 0 images  0 %  0 failed  0.0 images/s"),
    ],
)
def test_line_says_how_far_how_fast_and_how_long_still(progress, text):
    assert line(progress) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (42, "0:42"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3599.4, "59:59"),
        (3599.7, "1:00:00"),
        (11229, "3:07:09"),
        (360000, "100:00:00"),
    ],
)
def test_duration_is_written_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


def test_progress_has_no_eta_when_there_is_no_rate_yet():
    assert STARTING.eta_seconds is None
    assert HALF.eta_seconds == 80.0
    assert ALL.eta_seconds == 0.0


@pytest.mark.parametrize("display", DISPLAYS)
def test_display_says_nothing_of_a_report_when_the_run_ended_with_an_error(display):
    file = io.StringIO()
    shown = display(file)
    shown.show(HALF)
    shown.close(None)

    assert "Finished" not in file.getvalue()
    assert "report" not in file.getvalue()


def test_silent_shows_nothing(capfd):
    silent = Silent()
    silent.show(HALF)
    silent.close(REPORT)

    assert capfd.readouterr() == ("", "")


def test_lines_begin_with_the_progress_and_end_with_the_report():
    file = io.StringIO()
    lines = Lines(file)
    lines.show(HALF)
    lines.close(REPORT)

    assert file.getvalue() == f"{line(HALF)}\n{REPORT.text()}\n"


def test_lines_say_nothing_again_when_nothing_is_new():
    file = io.StringIO()
    lines = Lines(file)
    for _ in range(5):
        lines.show(STARTING)

    assert file.getvalue().splitlines() == [line(STARTING)]


def test_lines_wait_before_they_tell_of_more_images():
    file = io.StringIO()
    lines = Lines(file)
    for drawn in range(5):
        lines.show(Progress(10, drawn, 0, 1.0, ""))

    assert file.getvalue().splitlines() == [line(Progress(10, 0, 0, 1.0, ""))]


def test_lines_tell_of_every_change_of_step_without_waiting():
    file = io.StringIO()
    lines = Lines(file)
    for progress in (STARTING, STARTING, LOADING, LOADING, HALF):
        lines.show(progress)

    assert file.getvalue().splitlines() == [line(STARTING), line(LOADING), line(HALF)]


def test_json_lines_are_valid_json_and_end_with_the_report_and_exit_code():
    file = io.StringIO()
    lines = JsonLines(file)
    for progress in (STARTING, STARTING, HALF, ALL, ALL):
        lines.show(progress)
    lines.close(REPORT)
    said = [json.loads(text, parse_constant=pytest.fail) for text in file.getvalue().splitlines()]

    assert [each["event"] for each in said] == ["progress", "progress", "progress", "report"]
    assert [each["drawn"] for each in said[:-1]] == [0, 990, 1990]
    assert [each["eta_seconds"] for each in said[:-1]] == [None, 80.0, 0.0]
    assert (said[-1]["images"], said[-1]["reasons"]) == (1990, {"no prompt": 10})
    assert said[-1]["exit_code"] == REPORT.exit_code == 3


def test_bar_shows_progress_and_report_when_its_file_is_no_terminal():
    file = io.StringIO()
    bar = Bar(file)
    bar.show(STARTING)
    bar.show(HALF)
    bar.close(REPORT)

    assert line(HALF) in file.getvalue()
    assert file.getvalue().endswith(f"\n{REPORT.text()}\n")
    assert "\x1b" not in file.getvalue()


def test_bar_draws_on_the_file_it_was_given_and_nowhere_else(capfd):
    bar = Bar(io.StringIO())
    bar.show(HALF)
    bar.close(REPORT)

    assert capfd.readouterr() == ("", "")


def test_bar_shows_the_reasons_as_they_are_when_they_hold_richs_markup():
    file = io.StringIO()
    bar = Bar(file)
    bar.show(ALL)
    bar.close(replace(REPORT, reasons={"height = [red]13[/]": 10}))

    assert "10 failed: height = [red]13[/]\n" in file.getvalue()


def beat_of(store):
    return json.loads(store.read(PROGRESS_FILE))


def test_heartbeat_writes_the_progress_only_when_it_is_due(tmp_path):
    store, clock = Store(str(tmp_path / "out")), Clock()
    heartbeat = Heartbeat(store, clock)
    written = []
    for seconds in (0, 0.5 * HEARTBEAT_SECONDS, 0.4 * HEARTBEAT_SECONDS, 0.2 * HEARTBEAT_SECONDS):
        clock.now += seconds
        heartbeat.show(Progress(10, len(written), 0, 1.0, ""))
        written.append(beat_of(store)["drawn"])

    assert written == [0, 0, 0, 3]


def test_bar_leaves_stderr_to_its_owner_on_a_terminal(capsys, monkeypatch):
    """Ray's Python log goes to sys.stderr, which the command line sends to a file."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the file for a terminal
    file = io.StringIO()
    bar = Bar(file)
    bar.show(HALF)
    print("a line of Ray's log", file=sys.stderr)  # noqa: T201
    bar.close(None)
    assert "1,000 of 2,000" in file.getvalue()
    assert "Ray's log" not in file.getvalue()
    assert "Ray's log" in capsys.readouterr().err


def test_heartbeat_says_its_state_its_pace_and_the_progress(tmp_path):
    store = Store(str(tmp_path / "out"))
    Heartbeat(store).write("finished", HALF)
    beat = beat_of(store)

    assert beat.pop("updated") > 0
    assert beat == {
        "state": "finished",
        "every": HEARTBEAT_SECONDS,
        "planned": 2000,
        "drawn": 990,
        "failed": 10,
        "images_per_s": 12.5,
        "step": "",
        "eta_seconds": 80.0,
    }


@pytest.mark.parametrize(
    ("url", "every"),
    [
        ("{}", HEARTBEAT_SECONDS),
        ("file://{}", HEARTBEAT_SECONDS),
        ("memory://{}", REMOTE_HEARTBEAT_SECONDS),
    ],
)
def test_heartbeat_is_slower_when_the_output_is_not_on_this_machine(url, every, tmp_path):
    store = Store(url.format(tmp_path / "out"))
    Heartbeat(store).write("running", HALF)

    assert beat_of(store)["every"] == every


def test_heartbeat_stops_nothing_when_the_store_fails(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    clock = Clock()
    heartbeat = Heartbeat(Store(str(tmp_path / "out")), clock)
    heartbeat.show(HALF)
    (tmp_path / "out").unlink()
    heartbeat.show(HALF)
    assert not (tmp_path / "out").exists()  # it waits like after any other beat
    clock.now += HEARTBEAT_SECONDS
    heartbeat.show(ALL)

    assert beat_of(Store(str(tmp_path / "out")))["drawn"] == 1990
