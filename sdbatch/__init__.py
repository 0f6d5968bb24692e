"""sdbatch: from a table of prompts to a dataset of images, with exact resume.

From Python, the same code as the command line:

    import sdbatch

    job = sdbatch.load_job("jobs/dataset.yaml", ["sampling.guidance_scale=5"])
    report = sdbatch.run(job)
    print(report.images, report.failed)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdbatch.batch.pipeline import run_job as run
    from sdbatch.job import Job as Job
    from sdbatch.job import load as load_job
    from sdbatch.report.closing import Report as Report

__all__ = ["Job", "Report", "load_job", "run"]


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used: `sdbatch --help` needs none of them."""
    if name in ("Job", "load_job"):
        from sdbatch import job

        return job.Job if name == "Job" else job.load
    if name == "run":
        from sdbatch.batch.pipeline import run_job

        return run_job
    if name == "Report":
        from sdbatch.report.closing import Report

        return Report
    raise AttributeError(f"module 'sdbatch' has no attribute {name!r}")
