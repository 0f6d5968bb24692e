"""Times the calls of a model's variants on a device, one line of the table each."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sdbatch import registry
from sdbatch.engine import bits, cuda
from sdbatch.engine.attention import attention_by
from sdbatch.engine.family import Family
from sdbatch.engine.faults import is_lack_of_memory
from sdbatch.engine.limits import ROOM
from sdbatch.engine.places import make_rows
from sdbatch.engine.request import Request
from sdbatch.errors import SdbatchError, one_line
from sdbatch.models.build import Build
from sdbatch.models.deferred import deferred_imports
from sdbatch.models.find_model import ModelFiles

MOST_REPEATS = 7
REPEAT_SECONDS = 0.5  # for which a call is repeated
WIDTH = 58  # of a variant in the table


class OutOfMemory(Exception):
    """A variant needs more memory than the device has, or than should be used."""


@dataclass(frozen=True)
class Variant:
    """Values of the engine that are tried together."""

    device: str
    dtype: str
    lanes: int
    channels_last: bool
    compile: bool = False
    attention: str = "torch"
    threads: int = 1
    rewrites: tuple[str, ...] = ()

    @property
    def build(self) -> Build:
        """Return how its model is laid out; `bench` applies the attention itself."""
        layout = Build(self.device, self.dtype, self.channels_last, self.compile)
        return replace(layout, rewrites=self.rewrites)

    @property
    def text(self) -> str:
        """Return it for people."""
        layout = "channels_last" if self.channels_last else "contiguous"
        words = [f"{self.lanes} lanes", self.dtype, layout]
        words += [f"attention {self.attention}"] if self.attention != "torch" else []
        words += [f"rewrites {' '.join(self.rewrites)}"] if self.rewrites else []
        words += ["compiled"] if self.compile else []
        words += [f"{self.threads} threads"] if self.threads > 1 else []
        return ", ".join(words)


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    variant: str
    ms: float | None  # a lane, or an image decoded; on a CPU of CPU time; None: it cannot run
    gb: float | None = None  # of the GPU's memory at most
    fault: str = ""

    @property
    def text(self) -> str:
        """Return it for people."""
        if self.ms is None:
            return f"{self.variant:{WIDTH}} {self.fault}"
        gb = "-" if self.gb is None else f"{self.gb:.2f}"
        return f"{self.variant:{WIDTH}} {self.ms:10.3f} {gb:>8}"


@dataclass
class Bench:
    """A model that is loaded as its variants need it."""

    files: ModelFiles
    request: Request
    show: Callable[[str], None]
    lines: list[Line] = field(default_factory=list)
    _took: float = 0.0  # seconds of the longest measurement, without loading
    _loading: float = 0.0  # seconds of the last loading
    _loaded: tuple[Build, Family] | None = None

    def denoiser(self, variant: Variant) -> float | None:
        """Return the milliseconds a lane of a denoiser call; None if it cannot run.

        Raises:
            OutOfMemory: it runs, or would run, with too little memory left.
        """

        def prepare(family: Family) -> Callable[[], Any]:
            rows = make_rows(family, self.request, variant.lanes)
            return lambda: family.denoise(rows.latents, rows.timesteps, rows.conditions)

        return self._measure(variant, variant.text, variant.lanes, prepare)

    def decoder(self, variant: Variant, group: int) -> float | None:
        """Return the milliseconds an image of a decoder call of `group` images; as `denoiser`."""

        def prepare(family: Family) -> Callable[[], Any]:
            latents = make_rows(family, self.request, group).latents
            return lambda: family.decode(latents, family.dtype)

        images = f"decode {group} image{'s' * (group > 1)}"
        one = replace(variant, lanes=0, attention="torch")
        text = f"{images}, {one.text.removeprefix('0 lanes, ')}"
        return self._measure(one, text, group, prepare)

    def cost(self, variant: Variant) -> float:
        """Return the seconds that a measurement will take, as far as earlier ones tell."""
        loads = self._loaded is None or self._loaded[0] != variant.build
        return self._took + loads * self._loading

    def family(self, build: Build) -> Family:
        """Return the model laid out as `build` says; one is loaded at a time."""
        if self._loaded is None or self._loaded[0] != build:
            self.release()
            began = time.monotonic()
            bits.pin_bits(build.device)
            with deferred_imports(compile=build.compile):
                self._loaded = build, registry.load(self.files.family).load(self.files, build)
            self._loading = time.monotonic() - began
        return self._loaded[1]

    def release(self) -> None:
        """Release the memory of the loaded model."""
        self._loaded = None
        gc.collect()  # modules are in cycles
        cuda.release_cached_memory()

    def add(self, line: Line) -> None:
        """Add a line to the table and show it."""
        self.lines.append(line)
        self.show(line.text)

    @property
    def table(self) -> list[dict[str, Any]]:
        """Return the lines as they are kept."""
        return [asdict(line) for line in self.lines]

    def _measure(
        self,
        variant: Variant,
        text: str,
        count: int,
        prepare: Callable[[Family], Callable[[], Any]],
    ) -> float | None:
        on_gpu = variant.device == "cuda"
        try:
            torch.set_num_threads(variant.threads)
            family = self.family(variant.build)
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            with torch.inference_mode(), attention_by(variant.attention):
                ms = 1000 * _median(prepare(family), on_gpu=on_gpu) / count
            self._took = max(self._took, time.monotonic() - began)
        except Exception as error:  # of a kernel or a compiler: the variant is out
            if is_lack_of_memory(error):
                self.add(Line(text, None, fault="out of memory"))
                raise OutOfMemory from error
            lacks_package = isinstance(error, SdbatchError) and variant.rewrites
            if isinstance(error, SdbatchError | torch.AcceleratorError) and not lacks_package:
                raise
            self.add(Line(text, None, fault=f"cannot run: {one_line(error, 100)}"))
            return None
        if not on_gpu:
            self.add(Line(text, round(ms, 4)))
            return ms
        peak, total = (
            torch.cuda.max_memory_reserved(),
            torch.cuda.get_device_properties().total_memory,
        )
        self.add(Line(text, round(ms, 4), round(peak / 1e9, 3)))
        if peak > ROOM * total:
            raise OutOfMemory
        return ms


def _median(call: Callable[[], Any], *, on_gpu: bool) -> float:
    """Return the seconds of a call after one to warm up; on a CPU, the CPU time of all threads.

    CPU time, as several actors share the cores of a machine.
    """
    first = _seconds(call, on_gpu=on_gpu)
    repeats = min(MOST_REPEATS, max(1, int(REPEAT_SECONDS / max(first, 1e-6))))
    return statistics.median(_seconds(call, on_gpu=on_gpu) for _ in range(repeats))


def _seconds(call: Callable[[], Any], *, on_gpu: bool) -> float:
    if not on_gpu:
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began
