"""Progress in images: a bar on a terminal, plain lines in a log, JSON for programs."""

import json
import logging
import re
import threading
import time
from dataclasses import asdict
from typing import IO, Any, Protocol

from sdbatch.errors import one_line
from sdbatch.output.progress import Progress
from sdbatch.report.closing import Report

LINE_SECONDS = 5.0  # between plain lines
CLOSE_SECONDS = 10.0  # a terminal that does not take the report delays the end no longer
_log = logging.getLogger(__name__)
PROGRESS_LINE = re.compile(r"[\d,]+ of [\d,]+ images  ")  # the start of a `progress_line`


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
            eta = {"eta_seconds": progress.eta_seconds}
            self._print({"event": "progress", **asdict(progress), **eta})
            self._last = progress

    def close(self, report: Report | None) -> None:
        """Print the report."""
        if report is not None:
            self._print({"event": "report", **asdict(report), "exit_code": report.exit_code})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._file, flush=True)


class SteadyDisplay:
    """Shows progress from a thread of its own: a terminal that fails or waits stops no run."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._latest: Progress | None = None
        self._report: Report | None = None
        self._closed = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="sdbatch-display", daemon=True)
        self._thread.start()

    def show(self, progress: Progress) -> None:
        """Show the state of the run soon, unless a newer one comes before."""
        self._latest = progress
        self._changed.set()

    def close(self, report: Report | None) -> None:
        """Show the closing report; wait for it, but not long."""
        self._report, self._closed = report, True
        self._changed.set()
        self._thread.join(CLOSE_SECONDS)

    def _go_on(self) -> None:
        closed = False
        while not closed:
            self._changed.wait()
            self._changed.clear()
            closed = self._closed
            latest, self._latest = self._latest, None
            try:
                if latest is not None:
                    self._display.show(latest)
                if closed:
                    self._display.close(self._report)
            except (OSError, ValueError) as error:  # nobody reads the pipe: `| head`
                _log.warning(
                    "The progress cannot be shown any more (%s). The run goes on; `sdbatch "
                    "status OUTPUT` shows it.",
                    one_line(error),
                )
                return


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
