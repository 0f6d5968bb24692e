"""How well the engines were used in a run, from what the receipts of its shards say."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sdbatch.output.receipts import Receipt


@dataclass(frozen=True)
class Engines:
    """The engines of a run together."""

    speed: float  # of the bare engine's, which never waits and fills its lanes: (0, 1]
    idle: float  # part of the time in which they had no request
    filled: float  # part of the lanes of their UNet calls that drew
    lanes: dict[str, int]  # lanes of the batch -> images that were drawn in so many
    shrunk: list[str] = field(default_factory=list)  # with what it went on, and after what

    def lines(self) -> list[str]:
        """Return what people need to know of it."""
        lines = [
            f"  engine:      {self.speed:.0%} of the bare engine's speed "
            f"(idle {self.idle:.0%}, lanes {self.filled:.0%} filled)"
        ]
        for text in self.shrunk[:3]:
            lines.append(f"  went on with {text}")
        if len(self.lanes) > 1:
            drawn = ", ".join(f"{count:,} in {lanes}" for lanes, count in self.lanes.items())
            lines.append(
                f"  images drawn in unequal lanes: {drawn}. For equal ones set engine.lanes to "
                f"{min(self.lanes, key=int)} and start anew."
            )
        return lines


def of(receipts: Iterable[Receipt], seconds: float) -> Engines | None:
    """Sum up the engines of a run that drew `receipts` in `seconds` from its first engine's start.

    None where no receipt tells of an engine's work.
    """
    last: dict[tuple[str, int], dict[str, float]] = {}
    lanes: Counter[str] = Counter()
    shrunk: list[str] = []
    for receipt in receipts:
        facts = receipt.facts
        lanes.update(facts.get("lanes", {}))
        engine = facts.get("engine", {})
        if not engine.get("rows"):
            continue
        who = (facts["host"], facts["pid"])
        if engine["ticks"] >= last.get(who, {"ticks": 0})["ticks"]:
            last[who] = engine
        shrunk += [text for text in engine["shrunk"] if text not in shrunk]
    if not last or seconds <= 0:
        return None
    filled = sum(e["filled"] for e in last.values()) / sum(e["rows"] for e in last.values())
    busy = sum(e["seconds"] - e["idle_seconds"] for e in last.values())
    used = min(1.0, busy / (seconds * len(last)))
    ordered = dict(sorted(lanes.items(), key=lambda item: -int(item[0])))
    return Engines(round(used * filled, 4), round(1 - used, 4), round(filled, 4), ordered, shrunk)
