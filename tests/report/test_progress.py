"""Progress as a line, as a bar, as plain lines and as JSON."""

import io
import json
import sys
from dataclasses import replace

import pytest

from sdbatch.output.progress import Progress
from sdbatch.report.closing import Report
from sdbatch.report.progress import (
    PROGRESS_LINE,
    BarDisplay,
    JsonDisplay,
    LineDisplay,
    SilentDisplay,
    format_duration,
    progress_line,
)

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
DISPLAYS = (BarDisplay, LineDisplay, JsonDisplay)


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
def test_progress_line_has_the_count_the_rate_and_the_remaining_time(progress, text):
    assert progress_line(progress) == text
    assert PROGRESS_LINE.match(text)


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
def test_duration_is_formatted_as_on_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_progress_has_no_eta_when_there_is_no_rate_yet():
    assert STARTING.eta_seconds is None
    assert HALF.eta_seconds == 80.0
    assert ALL.eta_seconds == 0.0


@pytest.mark.parametrize("make_display", DISPLAYS)
def test_display_prints_no_report_when_the_run_ended_with_an_error(make_display):
    file = io.StringIO()
    display = make_display(file)
    display.show(HALF)
    display.close(None)

    assert "Finished" not in file.getvalue()
    assert "report" not in file.getvalue()


def test_silent_display_shows_nothing(capfd):
    display = SilentDisplay()
    display.show(HALF)
    display.close(REPORT)

    assert capfd.readouterr() == ("", "")


def test_line_display_prints_the_progress_and_then_the_report():
    file = io.StringIO()
    display = LineDisplay(file)
    display.show(HALF)
    display.close(REPORT)

    assert file.getvalue() == f"{progress_line(HALF)}\n{REPORT.text()}\n"


def test_line_display_does_not_repeat_a_line():
    file = io.StringIO()
    display = LineDisplay(file)
    for _ in range(5):
        display.show(STARTING)

    assert file.getvalue().splitlines() == [progress_line(STARTING)]


def test_line_display_waits_before_it_prints_more_images():
    file = io.StringIO()
    display = LineDisplay(file)
    for drawn in range(5):
        display.show(Progress(10, drawn, 0, 1.0, ""))

    assert file.getvalue().splitlines() == [progress_line(Progress(10, 0, 0, 1.0, ""))]


def test_line_display_prints_every_new_step_without_waiting():
    file = io.StringIO()
    display = LineDisplay(file)
    for progress in (STARTING, STARTING, LOADING, LOADING, HALF):
        display.show(progress)

    assert file.getvalue().splitlines() == [
        progress_line(STARTING),
        progress_line(LOADING),
        progress_line(HALF),
    ]


def test_json_display_prints_valid_json_and_ends_with_the_report_and_exit_code():
    file = io.StringIO()
    display = JsonDisplay(file)
    for progress in (STARTING, STARTING, HALF, ALL, ALL):
        display.show(progress)
    display.close(REPORT)
    events = [json.loads(text, parse_constant=pytest.fail) for text in file.getvalue().splitlines()]

    assert [each["event"] for each in events] == ["progress", "progress", "progress", "report"]
    assert [each["drawn"] for each in events[:-1]] == [0, 990, 1990]
    assert [each["eta_seconds"] for each in events[:-1]] == [None, 80.0, 0.0]
    assert (events[-1]["images"], events[-1]["reasons"]) == (1990, {"no prompt": 10})
    assert events[-1]["exit_code"] == REPORT.exit_code == 3


def test_bar_shows_progress_and_report_when_its_file_is_not_a_terminal():
    file = io.StringIO()
    display = BarDisplay(file)
    display.show(STARTING)
    display.show(HALF)
    display.close(REPORT)

    assert progress_line(HALF) in file.getvalue()
    assert file.getvalue().endswith(f"\n{REPORT.text()}\n")
    assert "\x1b" not in file.getvalue()


def test_bar_writes_to_its_file_alone(capfd):
    display = BarDisplay(io.StringIO())
    display.show(HALF)
    display.close(REPORT)

    assert capfd.readouterr() == ("", "")


def test_bar_shows_the_reasons_as_they_are_when_they_hold_rich_markup():
    file = io.StringIO()
    display = BarDisplay(file)
    display.show(ALL)
    display.close(replace(REPORT, reasons={"height = [red]13[/]": 10}))

    assert "10 failed: height = [red]13[/]\n" in file.getvalue()


def test_bar_does_not_redirect_stderr_on_a_terminal(capsys, monkeypatch):
    """Ray's Python log goes to sys.stderr, which the command line sends to a file."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich treats the file as a terminal
    file = io.StringIO()
    display = BarDisplay(file)
    display.show(HALF)
    print("a line of Ray's log", file=sys.stderr)  # noqa: T201
    display.close(None)
    assert "1,000 of 2,000" in file.getvalue()
    assert "Ray's log" not in file.getvalue()
    assert "Ray's log" in capsys.readouterr().err
