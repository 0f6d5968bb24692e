"""The results of a benchmark, with machine and versions: printed for people, written as JSON."""

import json
import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sdbatch.cores import cores
from sdbatch.libraries import optional_libraries
from sdbatch.output.identity import LIBRARIES


def versions() -> dict[str, str]:
    """Return the versions of the libraries; a machine for one benchmark may lack some of them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | optional_libraries()


def report(output: Path | None, **results: Any) -> None:
    """Print the results on the last line, with date, machine and versions; write them."""
    everything = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {cores()} cores",
        "versions": versions(),
        **results,
    }
    if output:
        output.write_text(json.dumps(everything, indent=2) + "\n")
    print(json.dumps(everything))


@dataclass
class Findings:
    """The results so far; written after every part, so that an interrupted run counts."""

    path: Path | None
    values: dict[str, Any] = field(default_factory=dict)

    def seconds(self, part: str, seconds: float) -> None:
        """Note the seconds that a part took."""
        self.values.setdefault("seconds", {})[part] = round(seconds, 1)
        self._write()

    def add(self, part: str, found: Any) -> None:
        """Add a part, print it, and write all."""
        self.values[part] = found
        print(f"## {part}\n{_lines(found)}\n", flush=True)
        self._write()

    def _write(self) -> None:
        if self.path:
            self.path.with_suffix(".json").write_text(json.dumps(self.values, indent=2) + "\n")
            text = "\n\n".join(
                f"## {name}\n\n{_lines(value)}" for name, value in self.values.items()
            )
            self.path.with_suffix(".md").write_text(text + "\n")


def _lines(found: Any) -> str:
    """Return results as a Markdown table if they are rows of columns, else as a list."""
    rows = [row for row in found.values() if isinstance(row, dict)]
    if not rows or len(rows) < len(found):
        return "\n".join(f"- {name}: {value}" for name, value in found.items())
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = [str(row.get(column, "")) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
