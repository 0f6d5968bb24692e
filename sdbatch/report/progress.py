"""Progress in images: a bar on a terminal, plain lines in a log, JSON for programs, a heartbeat."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, Protocol

from sdbatch.errors import StorageError
from sdbatch.output import names
from sdbatch.report.closing import Report
from sdbatch.storage import Store, is_local

LINE_SECONDS = 5.0  # between plain lines
HEARTBEAT_SECONDS = 2.0  # between writes of progress.json
REMOTE_HEARTBEAT_SECONDS = 15.0  # the same on an object store, where each write is a request
PROGRESS_LINE = re.compile(r"[\d,]+ of [\d,]+ images  ")  # the start of a `progress_line`


@dataclass(frozen=True)
class Progress:
    """The state of a run at a moment, in images of the whole output."""

    planned: int
    drawn: int
    failed: int
    images_per_s: float  # of this run so far
    step: str  # of the start, such as "loading the model"; empty once images are drawn

    @property
    def done(self) -> int:
        """Return the number of images that are drawn or failed."""
        return self.drawn + self.failed

    @property
    def eta_seconds(self) -> float | None:
        """Return the estimated seconds to the end; None if there is no rate yet."""
        return (self.planned - self.done) / self.images_per_s if self.images_per_s else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `eta_seconds`, as progress.json and `--json` have them."""
        return {**asdict(self), "eta_seconds": self.eta_seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress in a dictionary that `to_dict` made, or in progress.json."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class Display(Protocol):
    """Shows the progress of a run."""

    def show(self, progress: Progress) -> None:
        """Show the state of the run; called several times a second."""

    def close(self, report: Report | None) -> None:
        """Show the closing report; None if the run ended with an error."""


class SilentDisplay:
    """Shows nothing: the default of `sdbatch.run`."""

    def show(self, progress: Progress) -> None:
        """Show nothing."""

    def close(self, report: Report | None) -> None:
        """Show nothing."""


class BarDisplay:
    """Shows a live bar on a terminal."""

    def __init__(self, file: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._file = file
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(file=file),
            redirect_stdout=False,  # rich would print again what quiet_terminal sends to the log
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("images", text="")

    def show(self, progress: Progress) -> None:
        """Redraw the bar."""
        self._bar.start()  # has no effect on a bar that runs
        self._bar.update(
            self._task,
            total=progress.planned,
            completed=progress.done,
            text=progress_line(progress),
        )

    def close(self, report: Report | None) -> None:
        """Stop the bar and print the report below it."""
        self._bar.stop()
        if report is not None:
            print(report.text(), file=self._file, flush=True)


class LineDisplay:
    """Prints a plain line every few seconds and at every new step: for logs."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._next_time = 0.0
        self._last_line = ""
        self._last_step: str | None = None

    def show(self, progress: Progress) -> None:
        """Print a line if the step is new, or if a line is due and differs from the last one."""
        line = progress_line(progress)
        due = time.monotonic() >= self._next_time and line != self._last_line
        if due or progress.step != self._last_step:
            print(line, file=self._file, flush=True)
            self._next_time = time.monotonic() + LINE_SECONDS
            self._last_line, self._last_step = line, progress.step

    def close(self, report: Report | None) -> None:
        """Print the report."""
        if report is not None:
            print(report.text(), file=self._file, flush=True)


class JsonDisplay:
    """Prints a JSON object per line: {"event": "progress", ...}, last {"event": "report", ...}."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Print the progress if it has changed."""
        if progress != self._last:
            self._print({"event": "progress", **progress.to_dict()})
            self._last = progress

    def close(self, report: Report | None) -> None:
        """Print the report."""
        if report is not None:
            self._print({"event": "report", **asdict(report), "exit_code": report.exit_code})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._file, flush=True)


class Heartbeat:
    """Writes progress.json into the output, for `sdbatch status` on any machine."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._interval = HEARTBEAT_SECONDS if is_local(store.url) else REMOTE_HEARTBEAT_SECONDS
        self._next_time = 0.0

    def write_if_due(self, progress: Progress) -> None:
        """Write the progress of a run that goes on, unless the last write was a moment ago."""
        if self._clock() >= self._next_time:
            self._next_time = self._clock() + self._interval
            self.write("running", progress)

    def write(self, state: str, progress: Progress) -> None:
        """Write the progress now; a failed write is ignored.

        A store that is full or cannot be reached is reported by the writes of the shards.
        """
        heartbeat = {
            "state": state,
            "updated": time.time(),
            "every": self._interval,
            **progress.to_dict(),
        }
        try:
            self._store.put(names.PROGRESS, json.dumps(heartbeat).encode())
        except StorageError:
            return


def read_progress(store: Store) -> dict[str, Any] | None:
    """Return the content of progress.json; None if there is no such file.

    Raises:
        StorageError: it is not JSON.
    """
    text = store.read_if_exists(names.PROGRESS)
    try:
        return dict(json.loads(text)) if text is not None else None
    except ValueError as error:
        raise StorageError(
            f"{store.where(names.PROGRESS)} = {error}: must be JSON. Remove the file; a run writes "
            f"it again."
        ) from error


def progress_line(progress: Progress) -> str:
    """Return the progress as one line."""
    count = f"{progress.done:,} of {progress.planned:,} images"
    if progress.step:
        return f"{count}  {progress.step}"
    percent = 100 * progress.done // max(1, progress.planned)
    rate = f"{progress.images_per_s:.1f} images/s"
    seconds = progress.eta_seconds
    eta = "" if seconds is None else f"  ETA {format_duration(seconds)}"
    return f"{count}  {percent} %  {progress.failed:,} failed  {rate}{eta}"


def format_duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:05 or 3:07:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
