"""The closing report of a run."""

import shlex
from dataclasses import dataclass, field

from sdbatch.output import names
from sdbatch.output.devices import several_devices
from sdbatch.report.utilisation import Utilisation
from sdbatch.storage import is_local

MAX_REASONS = 10


@dataclass(frozen=True)
class Report:
    """The result of a run.

    Counts are of the whole output; `drawn_now` and the times are of this run alone.
    """

    output: str
    planned: int  # images that the complete output accounts for, drawn or failed
    images: int  # drawn
    failed: int
    reasons: dict[str, int]  # why rows failed -> number of rows, most frequent first
    drawn_now: int
    seconds: float  # from the start of the command's work to its end
    images_per_s: float  # of this run, drawn or failed, since its first engine was ready
    began: float  # Unix time
    stopped: str | None = None  # why the run ended early; None: every shard has its receipt
    startup: dict[str, float] = field(default_factory=dict)  # seconds from the start to each step
    engines: Utilisation | None = None  # of this run; None: nothing was drawn
    devices: dict[str, int] = field(default_factory=dict)  # kind of device -> images drawn by it
    from_pictures: int = 0  # of the images

    @property
    def exit_code(self) -> int:
        """Return the command's exit code: 0 all drawn, 3 finished with failed rows, 1 stopped."""
        if self.stopped is not None:
            return 1
        return 3 if self.failed else 0

    def text(self) -> str:
        """Return the report for people."""
        outcome = "Stopped" if self.stopped else "Finished"
        lines = [
            f"{outcome}: {self.images:,} images of {self.planned:,}, {self.failed:,} failed.",
            f"  {self.drawn_now:,} drawn by this run in {self.seconds:.1f} s, "
            f"{self.images_per_s:.1f} images/s",
        ]
        if self.engines is not None:
            lines += self.engines.lines()
        several = several_devices(self.devices)
        lines += [f"  {several}"] if several else []
        for reason, count in list(self.reasons.items())[:MAX_REASONS]:
            lines.append(f"  {count:,} failed: {reason}")
        if len(self.reasons) > MAX_REASONS:
            lines.append(f"  and {len(self.reasons) - MAX_REASONS} more reasons")
        if self.failed:
            lines.append(f"  failed rows: {self.output}/{names.FAILED}/*.parquet")
        lines.append(f"  dataset:     {self.output}")
        if self.stopped is None:
            lines.append(f"  gallery:     {gallery_command(self.output)}")
            if self.images:
                lines.append(f"  sheet:       sdbatch sheet {shlex.quote(self.output)}")
            lines.append(f"  verify:      sdbatch verify {shlex.quote(self.output)}")
        else:
            lines.append("  resume:      run the same command again")
        return "\n".join(lines)


def gallery_command(output: str) -> str:
    """Return the shell command that opens the output's gallery in a browser."""
    page = f"{output}/{names.GALLERY}"
    if is_local(output):
        return f"python3 -m webbrowser {shlex.quote(page)}"
    get = "fsspec.open_local('simplecache::' + sys.argv[1], simplecache={'same_names': True})"
    script = f"import fsspec, sys, webbrowser; webbrowser.open('file://' + {get})"
    return f'python3 -c "{script}" {shlex.quote(page)}'
