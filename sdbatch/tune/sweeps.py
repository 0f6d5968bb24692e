"""What is tried, in which order, and what is chosen: coarse first, and no more than time allows."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from sdbatch.engine.limits import DECODE_GROUP
from sdbatch.errors import ModelError
from sdbatch.tune.bench import OutOfMemory, Variant

NEAR = 1.03  # of the least time: as good, so that the fewest lanes or what is usual are chosen
GAIN = 0.99  # of the least time so far, which more lanes must take at most
COMPILED = 1.1  # how many times as fast it must be: it takes minutes when actors start
LANES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
GROUPS = (1, 2, 4, 8)
KERNELS = ("cudnn", "flash", "efficient")
LANES_OF_AN_IMAGE = 50  # of 25 steps with guidance: the weight of lanes against one decoding


class Budget:
    """The time that tuning may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    def left(self, share: float = 1.0) -> float:
        """Return the seconds until a share of the time is over."""
        return share * self.seconds - (time.monotonic() - self._began)


class Sweep:
    """Measures variants while there is time.

    Args:
        denoiser: `Bench.denoiser`.
        decoder: `Bench.decoder`.
        has_time: tells whether so many measurements of a variant can still be made.
    """

    def __init__(
        self,
        denoiser: Callable[[Variant], float | None],
        decoder: Callable[[Variant, int], float | None],
        has_time: Callable[[Variant, int], bool],
    ) -> None:
        self._measure = denoiser
        self._decoder = decoder
        self._has_time = has_time
        self._known: dict[Variant, float | None] = {}

    def lanes(self, base: Variant, most: int) -> Variant:
        """Return the variant with the fewest lanes that are as fast as any: first more, then fewer.

        So if time ends, nothing worse is chosen than the lanes of `base`.

        Raises:
            ModelError: there is none.
        """

        def measure(count: int) -> float | None:
            return self._denoiser(replace(base, lanes=count))

        counts = [count for count in LANES if count <= most]
        found = self._around(base, base.lanes, counts, measure)
        lanes = _fewest(found)
        if lanes is None:
            raise ModelError(
                f"engine.lanes = {base.lanes} and fewer: none could be drawn here, as the table "
                f"says: must fit the device. Try a smaller --size, or another device."
            )
        return replace(base, lanes=lanes)

    def group(self, variant: Variant) -> int | None:
        """Return the fewest images in a decoder call that are as fast as any."""
        most = max(1, variant.lanes // 2)
        counts = [count for count in GROUPS if count <= most]
        first = min(DECODE_GROUP, most)
        found = self._around(variant, first, counts, partial(self._decoder, variant))
        return _fewest(found)

    def fastest(self, variants: Iterable[Variant]) -> Variant:
        """Return the fastest of variants; the first if it is as fast, or none could be measured."""
        variants = list(variants)
        found: dict[Variant, float] = {}
        for variant in variants:
            if found and not self._has_time(variant, 1):
                break
            try:
                ms = self._denoiser(variant)
            except OutOfMemory:
                continue
            if ms is not None:
                found[variant] = ms
        least = min(found.values(), default=0.0)
        if not found or found.get(variants[0], math.inf) <= NEAR * least:
            return variants[0]
        return min(found, key=lambda each: found[each])

    def rewrites(self, base: Variant, group: int, names: Iterable[str]) -> Variant:
        """Return the variant with those rewrites that make an image faster, tried one by one."""
        best, least = base, self._image(base, group)
        for name in names:
            trial = replace(best, rewrites=tuple(sorted((*best.rewrites, name))))
            if not self._has_time(trial, 2):
                break
            try:
                ms = self._image(trial, group)
            except OutOfMemory:
                continue
            if ms is not None and (least is None or NEAR * ms < least):
                best, least = trial, ms
        return best

    def _image(self, variant: Variant, group: int) -> float | None:
        """Return the milliseconds of an image of 25 guided steps; None if it cannot be drawn."""
        lane, decoded = self._denoiser(variant), self._decoder(variant, group)
        if lane is None or decoded is None:
            return None
        return LANES_OF_AN_IMAGE * lane + decoded

    def _denoiser(self, variant: Variant) -> float | None:
        """Return what `Bench.denoiser` returns, measured once."""
        if variant not in self._known:
            self._known[variant] = self._measure(variant)
        return self._known[variant]

    def _around(
        self, base: Variant, first: int, counts: list[int], measure: Callable[[int], float | None]
    ) -> dict[int, float]:
        """Measure with the first count and more, then with fewer."""
        found = self._sweep(base, [count for count in counts if count >= first], measure)
        fewer = [count for count in reversed(counts) if count < first]
        return found | self._sweep(base, fewer, measure, found)

    def _sweep(
        self,
        base: Variant,
        counts: list[int],
        measure: Callable[[int], float | None],
        known: dict[int, float] | None = None,
    ) -> dict[int, float]:
        """Measure with one count after the other until two in a row are not worth it.

        More lanes must take less time; fewer must not take more.
        """
        found = dict(known or {})
        more = counts[:1] < counts[-1:]
        worthless = 0
        for count in counts:
            if found and not self._has_time(base, 2):
                break
            try:
                ms = measure(count)
            except OutOfMemory:
                if more:
                    break
                continue
            if ms is None:
                break
            enough = (GAIN if more else NEAR) * min(found.values(), default=math.inf)
            worthless = 0 if ms <= enough else worthless + 1
            found[count] = ms
            if worthless == 2:
                break
        return found


def _fewest(found: dict[int, float]) -> int | None:
    least = min(found.values(), default=0.0)
    return min((count for count, ms in found.items() if ms <= NEAR * least), default=None)
