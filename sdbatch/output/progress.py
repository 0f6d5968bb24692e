"""How far a run is, and the heartbeat that says so in progress.json, for any machine to read."""

from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sdbatch.output import names
from sdbatch.storage import Store

State = Literal["running", "finished", "stopped"]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Heartbeat:
    """The content of progress.json."""

    run: str  # whose it is: Run.id
    beat: int  # one more with every write, so that a reader needs no clock
    state: State
    every: float  # seconds between writes
    progress: Progress


_HEARTBEAT = TypeAdapter(Heartbeat)


def write_heartbeat(store: Store, heartbeat: Heartbeat) -> None:
    """Write progress.json."""
    store.put(names.PROGRESS, _HEARTBEAT.dump_json(heartbeat))


def read_heartbeat(store: Store) -> Heartbeat | None:
    """Return the last heartbeat of an output; None if there is none, or it cannot be read."""
    data = store.read_if_exists(names.PROGRESS)
    try:
        return _HEARTBEAT.validate_json(data) if data is not None else None
    except ValidationError:
        return None
