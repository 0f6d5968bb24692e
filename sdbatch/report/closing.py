"""The closing report of a run."""

import shlex
from dataclasses import dataclass, field

from sdbatch.report.utilisation import Engines
from sdbatch.storage import is_local


@dataclass(frozen=True)
class Report:
    """What a run left. Counts are of the whole output; `drawn_now` and the times of this run."""

    output: str
    planned: int  # images that the output accounts for when it is finished
    images: int  # drawn
    failed: int
    reasons: dict[str, int]  # why rows failed -> how many, most frequent first
    drawn_now: int
    seconds: float  # from the start of the command's work to its end
    images_per_s: float  # of this run, drawn or failed, since its first engine was ready
    began: float  # clock seconds
    stopped: str | None = None  # why the run ended early; None: every shard has its receipt
    startup: dict[str, float] = field(default_factory=dict)  # seconds from the start to each step
    engines: Engines | None = None  # of this run; None: nothing was drawn

    @property
    def exit_code(self) -> int:
        """Return the command's exit code: 0 all drawn, 3 finished with failed rows, 1 stopped."""
        if self.stopped is not None:
            return 1
        return 3 if self.failed else 0

    def text(self) -> str:
        """Return the report for people."""
        done = "Stopped" if self.stopped else "Finished"
        lines = [
            f"{done}: {self.images:,} images of {self.planned:,}, {self.failed:,} failed.",
            f"  {self.drawn_now:,} drawn now in {self.seconds:.1f} s, "
            f"{self.images_per_s:.1f} images/s",
        ]
        if self.engines is not None:
            lines += self.engines.lines()
        for reason, count in list(self.reasons.items())[:10]:
            lines.append(f"  {count:,} failed: {reason}")
        if len(self.reasons) > 10:
            lines.append(f"  and {len(self.reasons) - 10} more reasons")
        if self.failed:
            lines.append(f"  failed rows: {self.output}/failed/*.parquet")
        lines.append(f"  dataset:     {self.output}")
        if self.stopped is None:
            lines.append(f"  look:        {look(self.output)}")
            if self.images:
                lines.append(f"  sheet:       sdbatch sheet {shlex.quote(self.output)}")
            lines.append(f"  check:       sdbatch verify {shlex.quote(self.output)}")
        else:
            lines.append("  go on:       run the same command again")
        return "\n".join(lines)


def look(output: str) -> str:
    """Return the command that shows the output's gallery."""
    page = f"{output}/gallery/index.html"
    if is_local(output):
        return f"python3 -m webbrowser {shlex.quote(page)}"
    get = "fsspec.open_local('simplecache::' + sys.argv[1], simplecache={'same_names': True})"
    script = f"import fsspec, sys, webbrowser; webbrowser.open('file://' + {get})"
    return f'python3 -c "{script}" {shlex.quote(page)}'
