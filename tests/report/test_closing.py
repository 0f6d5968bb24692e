"""The closing report of a run."""

import shlex
import shutil
from dataclasses import replace

import pytest

from sdbatch.report.closing import Report, gallery_command

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
def test_report_has_an_exit_code_for_each_way_that_a_run_ends(report, code):
    assert report.exit_code == code


def test_report_lists_what_was_drawn_and_the_next_commands():
    assert DRAWN.text().splitlines() == [
        "Finished: 2,000 images of 2,000, 0 failed.",
        "  1,500 drawn by this run in 12.3 s, 130.5 images/s",
        "  dataset:     out/dogs",
        "  gallery:     python3 -m webbrowser out/dogs/gallery/index.html",
        "  sheet:       sdbatch sheet out/dogs",
        "  verify:      sdbatch verify out/dogs",
    ]


def test_report_lists_why_rows_failed_and_where_they_are():
    lines = FAILED.text().splitlines()

    assert lines[0] == "Finished: 1,988 images of 2,000, 12 failed."
    assert lines[2:5] == [
        "  7 failed: no prompt",
        "  5 failed: bad height",
        "  failed rows: out/dogs/failed/*.parquet",
    ]


def test_report_describes_how_to_resume_when_the_run_stopped():
    text = replace(FAILED, stopped="interrupted").text()

    assert text.startswith("Stopped: 1,988 images of 2,000, 12 failed.\n")
    assert text.endswith("  resume:      run the same command again")
    assert "gallery" not in text  # it is written at the end
    assert "sheet" not in text
    assert "verify" not in text


@pytest.mark.parametrize(("count", "lines"), [(9, 9), (10, 10), (11, 10), (200, 10)])
def test_report_lists_at_most_ten_reasons_and_counts_the_rest(count, lines):
    reasons = {f"reason {number}": 1 for number in range(count)}
    text = replace(DRAWN, failed=count, reasons=reasons).text()

    assert text.count("1 failed: reason ") == lines
    assert ("more reasons" in text) == (count > lines)
    assert f"and {count - lines} more" in text or count == lines


@pytest.mark.parametrize("output", ["out/dogs", "s3://bucket/dogs", "memory://dogs"])
def test_gallery_command_exists_and_names_the_gallery(output):
    program, *_, page = gallery_command(output).split()

    assert page == f"{output}/gallery/index.html"
    assert shutil.which(program)


def test_report_quotes_the_output_in_its_commands_for_a_shell():
    text = replace(DRAWN, output="/data/my dog's").text()
    commands = {
        line.split(":")[0].strip(): shlex.split(line.partition(":")[2])
        for line in text.splitlines()
        if "gallery:" in line or "sheet:" in line or "verify:" in line
    }

    assert commands["gallery"][-1] == "/data/my dog's/gallery/index.html"
    assert commands["sheet"] == ["sdbatch", "sheet", "/data/my dog's"]
    assert commands["verify"] == ["sdbatch", "verify", "/data/my dog's"]


def test_report_says_if_several_kinds_of_device_drew_the_output():
    one, two = {"H100 (x)": 2000}, {"H100 (x)": 1990, "A100 (y)": 10}
    assert "device" not in replace(DRAWN, devices=one).text()
    assert (
        replace(DRAWN, devices=two)
        .text()
        .splitlines()[2]
        .startswith(
            "  2 kinds of device drew this output: 1,990 images by H100 (x), 10 images by A100 (y)."
        )
    )
