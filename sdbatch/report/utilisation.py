"""How well a run used its engines, measured from the receipts of its shards."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sdbatch.output.receipts import Receipt

MAX_REDUCTIONS = 3  # in the report for people


@dataclass(frozen=True)
class Utilisation:
    """The utilisation of all engines of a run together."""

    speed: float  # relative to a bare engine that never waits and fills its lanes: (0, 1]
    idle: float  # fraction of the time without a request
    filled: float  # fraction of the lanes of all denoiser calls that were in use
    lanes: dict[str, int]  # number of lanes of an engine -> images drawn with it
    decoded_again: int = 0  # images that were not finite in the engine's dtype
    shrunk: list[str] = field(
        default_factory=list
    )  # lanes after each lack of memory, and its error

    def lines(self) -> list[str]:
        """Return the lines of the closing report."""
        lines = [
            f"  engine:      {self.speed:.0%} of the bare engine's speed "
            f"(idle {self.idle:.0%}, lanes {self.filled:.0%} filled)"
        ]
        for text in self.shrunk[:MAX_REDUCTIONS]:
            lines.append(f"  reduced to {text}")
        if self.decoded_again:
            lines.append(
                f"  decoded again in float32: {self.decoded_again:,} images, because they were not "
                f"finite in engine.dtype. To decode each once, set model.vae to a VAE for that "
                f"dtype, or engine.dtype to bfloat16 or float32."
            )
        if self.shrunk and len(self.lanes) > 1:  # else by the size of the images, always the same
            counts = ", ".join(f"{count:,} with {lanes}" for lanes, count in self.lanes.items())
            lines.append(
                f"  the number of lanes varied: {counts}. For bit-equal images set engine.lanes "
                f"to {min(self.lanes, key=int)} and start again with --overwrite."
            )
        return lines


def measure_utilisation(receipts: Iterable[Receipt], seconds: float) -> Utilisation | None:
    """Sum up the engines that drew `receipts` in `seconds`, counted from the first engine's start.

    Returns None if no receipt holds measurements of an engine.
    """
    engines: dict[tuple[str, int], dict[str, Any]] = {}  # host, pid -> its latest measurements
    lanes: Counter[str] = Counter()
    shrunk: list[str] = []
    decoded_again = 0
    for receipt in receipts:
        facts = receipt.facts
        lanes.update(facts.get("lanes", {}))
        decoded_again += facts.get("decoded_again", 0)
        engine = facts.get("engine", {})
        if not engine.get("rows"):
            continue
        process = (facts["host"], facts["pid"])
        if engine["ticks"] >= engines.get(process, {"ticks": 0})["ticks"]:
            engines[process] = engine
        shrunk += [text for text in engine["shrunk"] if text not in shrunk]
    if not engines or seconds <= 0:
        return None
    filled = sum(e["filled"] for e in engines.values()) / sum(e["rows"] for e in engines.values())
    busy_seconds = sum(e["seconds"] - e["idle_seconds"] for e in engines.values())
    busy = min(1.0, busy_seconds / (seconds * len(engines)))
    return Utilisation(
        speed=round(busy * filled, 4),
        idle=round(1 - busy, 4),
        filled=round(filled, 4),
        lanes=dict(sorted(lanes.items(), key=lambda item: -int(item[0]))),
        decoded_again=decoded_again,
        shrunk=shrunk,
    )
