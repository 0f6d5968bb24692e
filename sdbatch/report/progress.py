"""Progress in images: a live bar on a terminal, plain lines elsewhere, JSON lines for machines."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, Protocol

from sdbatch.errors import StorageError
from sdbatch.report.closing import Report
from sdbatch.storage import Store, is_local

PROGRESS_FILE = "progress.json"
LINE_SECONDS = 5.0  # between plain lines
HEARTBEAT_SECONDS = 2.0  # between writes of progress.json; an object store gets fewer
REMOTE_HEARTBEAT_SECONDS = 15.0
LINE = re.compile(r"[\d,]+ of [\d,]+ images  ")  # how `line` begins


@dataclass(frozen=True)
class Progress:
    """A run at a moment, in images of the whole output."""

    planned: int
    drawn: int
    failed: int
    images_per_s: float  # of this run so far
    step: str  # what it waits for while no image is drawn yet

    @property
    def done(self) -> int:
        """Return how many images are accounted for."""
        return self.drawn + self.failed

    @property
    def eta_seconds(self) -> float | None:
        """Return the seconds that the rest takes at this rate; None if there is no rate yet."""
        return (self.planned - self.done) / self.images_per_s if self.images_per_s else None


class Display(Protocol):
    """Where progress is shown."""

    def show(self, progress: Progress) -> None:
        """Show the state of the run; called twice a second."""

    def close(self, report: Report | None) -> None:
        """Show the closing report; None if the run ended with an error."""


class Silent:
    """Shows nothing: `sdbatch.run` where nobody looks."""

    def show(self, progress: Progress) -> None:
        """Show nothing."""

    def close(self, report: Report | None) -> None:
        """Show nothing."""


class Bar:
    """A live bar on a terminal."""

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
            redirect_stdout=False,  # or what quiet_terminal keeps away comes back through rich
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("images", text="")

    def show(self, progress: Progress) -> None:
        """Redraw the bar."""
        self._bar.start()  # no harm if it runs
        self._bar.update(
            self._task, total=progress.planned, completed=progress.done, text=line(progress)
        )

    def close(self, report: Report | None) -> None:
        """Leave the bar as it is and print the report below."""
        self._bar.stop()
        if report is not None:
            print(report.text(), file=self._file, flush=True)


class Lines:
    """A plain line now and then, and at every change of step: for logs."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._next = 0.0
        self._last = ""
        self._step: str | None = None

    def show(self, progress: Progress) -> None:
        """Print a line if one is due and says something new, or the step has changed."""
        text = line(progress)
        due = time.monotonic() >= self._next and text != self._last
        if due or progress.step != self._step:
            print(text, file=self._file, flush=True)
            self._next, self._last = time.monotonic() + LINE_SECONDS, text
            self._step = progress.step

    def close(self, report: Report | None) -> None:
        """Print the report."""
        if report is not None:
            print(report.text(), file=self._file, flush=True)


class JsonLines:
    """One JSON object a line: {"event": "progress", ...} and at last {"event": "report", ...}."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Print the progress if it has changed."""
        if progress != self._last:
            self._print({"event": "progress", **as_json(progress)})
            self._last = progress

    def close(self, report: Report | None) -> None:
        """Print the report."""
        if report is not None:
            self._print({"event": "report", **asdict(report), "exit_code": report.exit_code})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._file, flush=True)


class Heartbeat:
    """Writes progress.json into the output now and then, for `sdbatch status` from anywhere."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._every = HEARTBEAT_SECONDS if is_local(store.url) else REMOTE_HEARTBEAT_SECONDS
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        """Write the progress if it is due."""
        if self._clock() >= self._next:
            self._next = self._clock() + self._every
            self.write("running", progress)

    def write(self, state: str, progress: Progress) -> None:
        """Write the progress now; a heartbeat that cannot be written stops nothing."""
        said = {"state": state, "updated": time.time(), "every": self._every, **as_json(progress)}
        try:
            self._store.put(PROGRESS_FILE, json.dumps(said).encode())
        except StorageError:
            return  # the shards' own writes report a store that is out of reach or full


def read(store: Store) -> dict[str, Any] | None:
    """Return what progress.json says; None if there is none."""
    text = store.find(PROGRESS_FILE)
    try:
        return dict(json.loads(text)) if text is not None else None
    except ValueError as error:
        raise StorageError(
            f"{store.where(PROGRESS_FILE)} = {error}: must be JSON. Remove it, it is a heartbeat."
        ) from error


def from_json(said: dict[str, Any]) -> Progress:
    """Return the progress that `as_json` gave."""
    return Progress(**{field.name: said[field.name] for field in fields(Progress)})


def line(progress: Progress) -> str:
    """Return the progress in one line."""
    count = f"{progress.done:,} of {progress.planned:,} images"
    if progress.step:
        return f"{count}  {progress.step}"
    share = 100 * progress.done // max(1, progress.planned)
    eta = progress.eta_seconds
    left = "" if eta is None else f"  ETA {duration(eta)}"
    rate = f"{progress.images_per_s:.1f} images/s"
    return f"{count}  {share} %  {progress.failed:,} failed  {rate}{left}"


def duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:05 or 3:07:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_json(progress: Progress) -> dict[str, Any]:
    """Return the progress with what follows from it."""
    return {**asdict(progress), "eta_seconds": progress.eta_seconds}
