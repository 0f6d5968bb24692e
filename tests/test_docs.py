"""The documents that are written from the code are those that the code writes now."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_reference_of_the_job_file_is_current():
    page = runpy.run_path(str(DOCS / "reference.py"))["page"]
    assert page() == (DOCS / "job.md").read_text(encoding="utf-8")
