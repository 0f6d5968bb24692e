"""The closing report of a run."""

import shlex
import shutil
from dataclasses import replace

import pytest

from sdbatch.report.closing import Report, look

DRAWN = Report(
    output="out/dogs",
    planned=2000,
    images=2000,
    failed=0,
    reasons={},
    drawn_now=1500,
    seconds=12.34,
    images_per_s=130.5,
    began=0.0,
)
FAILED = replace(DRAWN, images=1988, failed=12, reasons={"no prompt": 7, "bad height": 5})


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (DRAWN, 0),
        (FAILED, 3),
        (replace(DRAWN, stopped="interrupted"), 1),
        (replace(FAILED, stopped="interrupted"), 1),
        (replace(DRAWN, stopped=""), 1),
    ],
)
def test_report_has_the_exit_code_of_how_the_run_ended(report, code):
    assert report.exit_code == code


def test_report_says_what_was_drawn_and_what_to_do_next():
    assert DRAWN.text().splitlines() == [
        "Finished: 2,000 images of 2,000, 0 failed.",
        "  1,500 drawn now in 12.3 s, 130.5 images/s",
        "  dataset:     out/dogs",
        "  look:        python3 -m webbrowser out/dogs/gallery/index.html",
        "  sheet:       sdbatch sheet out/dogs",
        "  check:       sdbatch verify out/dogs",
    ]


def test_report_says_why_rows_failed_and_where_they_are():
    lines = FAILED.text().splitlines()

    assert lines[0] == "Finished: 1,988 images of 2,000, 12 failed."
    assert lines[2:5] == [
        "  7 failed: no prompt",
        "  5 failed: bad height",
        "  failed rows: out/dogs/failed/*.parquet",
    ]


def test_report_says_how_to_go_on_when_the_run_stopped():
    text = replace(FAILED, stopped="interrupted").text()

    assert text.startswith("Stopped: 1,988 images of 2,000, 12 failed.\n")
    assert text.endswith("  go on:       run the same command again")
    assert "gallery" not in text  # there is none yet
    assert "sheet" not in text
    assert "verify" not in text


@pytest.mark.parametrize(("count", "shown"), [(9, 9), (10, 10), (11, 10), (200, 10)])
def test_report_names_ten_reasons_at_most_and_says_how_many_more(count, shown):
    reasons = {f"reason {number}": 1 for number in range(count)}
    text = replace(DRAWN, failed=count, reasons=reasons).text()

    assert text.count("1 failed: reason ") == shown
    assert ("more reasons" in text) == (count > shown)
    assert f"and {count - shown} more" in text or count == shown


@pytest.mark.parametrize("output", ["out/dogs", "s3://bucket/dogs", "memory://dogs"])
def test_look_is_a_command_that_exists_and_names_the_gallery(output):
    program, *_, page = look(output).split()

    assert page == f"{output}/gallery/index.html"
    assert shutil.which(program)


def test_report_quotes_the_output_in_its_commands_when_a_shell_would_split_it():
    text = replace(DRAWN, output="/data/my dog's").text()
    commands = {
        line.split(":")[0].strip(): shlex.split(line.partition(":")[2])
        for line in text.splitlines()
        if "look:" in line or "sheet:" in line or "check:" in line
    }

    assert commands["look"][-1] == "/data/my dog's/gallery/index.html"
    assert commands["sheet"] == ["sdbatch", "sheet", "/data/my dog's"]
    assert commands["check"] == ["sdbatch", "verify", "/data/my dog's"]
