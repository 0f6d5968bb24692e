"""`sdbatch tune`: from a model or a job to a choice that is kept.

In this process, without Ray; what is compiled or must be the same in another process is drawn in
one of its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from sdbatch import advice, cores, hardware, registry, resolve, tuned
from sdbatch.engine import cuda
from sdbatch.engine.limits import DECODE_GROUP, ModelLimits
from sdbatch.engine.places import Difference, differences, hashes
from sdbatch.engine.request import Request
from sdbatch.errors import JobError
from sdbatch.hardware import Device
from sdbatch.job import Job, load, parse
from sdbatch.models import find_model as models
from sdbatch.models.find_model import ModelFiles
from sdbatch.tune import processes
from sdbatch.tune.bench import WIDTH, Bench, Line, OutOfMemory, Variant
from sdbatch.tune.processes import CallError
from sdbatch.tune.sweeps import COMPILED, KERNELS, Budget, Sweep
from sdbatch.tuned import Choice, Entry

Show = Callable[[str], None]
SWEPT, DONE_COMPILING = 0.4, 0.75  # shares of the time; the rest is for the check of bits

CHECK = 6  # how many times as long as a measurement the check of bits takes on a CPU at most


@dataclass(frozen=True)
class Options:
    """What `sdbatch tune` is called with."""

    model: str  # as `model.path` in a job; or a job file
    size: str | None  # WIDTHxHEIGHT or SIDE
    device: str  # auto, cpu, cuda
    seconds: float  # that it may take


def tune(options: Options, show: Show) -> Entry:
    """Measure what draws a model fastest on this machine, and keep it.

    Raises:
        SdbatchError: the model, the size or the device cannot be used, or nothing can be kept.
    """
    budget = Budget(options.seconds)
    tuned.check_writable()
    job = _job_of(options)
    files, job = resolve.find_model(job)
    limits: ModelLimits = registry.load(files.family).LIMITS
    _check_size(job, limits)
    device = _device_of(job)
    key = advice.tuning_key(job, files, device, models.sha256(files))
    show(
        f"{device.name}{f', driver {device.driver}' if device.driver else ''}; "
        f"{', '.join(f'{name} {version}' for name, version in key.versions.items())}"
    )
    show(f"{options.model}, {key.width}x{key.height}, at most {options.seconds:g} s")
    show(f"\n{'variant':{WIDTH}} {'ms a lane':>10} {'GB':>8}\n{'':{WIDTH}} {'or image':>10}")
    example = Request(**job.sampling.model_dump(), prompt="a picture, number")
    bench = Bench(files, resolve.with_picture(example, files), show)
    before = torch.get_num_threads()
    try:
        run = _Tuning(job, device, limits, bench, budget)
        choice = run.on_gpu() if device.kind == "cuda" else run.on_cpu()
    except torch.AcceleratorError as error:
        raise cuda.device_failed(error) from error
    finally:
        torch.set_num_threads(before)
        cuda.allow_split_k(True)
    entry = Entry(key, choice, datetime.now(UTC).date().isoformat(), bench.table)
    file = tuned.keep(entry)
    show(f"\n{_describe(choice)}\nKept for this model, size and device in {file}")
    return entry


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of a size, such as 512x768 (WIDTHxHEIGHT) or 512.

    Raises:
        JobError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if found is None:
        raise JobError(
            f"--size = {text!r}: must be WIDTHxHEIGHT or one number, in pixels, such as 512x768 "
            f"or 512."
        )
    return int(found[2] or found[1]), int(found[1])


def _job_of(options: Options) -> Job:
    """Return the job that is tuned for: of a job file, or of a model alone."""
    values: dict[str, Any] = {}
    if options.size is not None:
        values["sampling.height"], values["sampling.width"] = parse_size(options.size)
    if options.device != "auto":
        values["engine.device"] = options.device
    overrides = [f"{key}={value}" for key, value in values.items()]
    if options.model.endswith((".yaml", ".yml")):
        return load(options.model, overrides)
    table = {"rows": [{"prompt": ""}]}
    return parse({"prompts": table, "model": options.model, "output": {"path": "-"}}, overrides)


def _check_size(job: Job, limits: ModelLimits) -> None:
    height, width = job.sampling.height, job.sampling.width
    try:
        limits.check_size(height, width)
    except ValueError as error:
        raise JobError(f"--size = {width}x{height}: {error}. Such as 512x512.") from error


def _device_of(job: Job) -> Device:
    """Return the device to tune: as the job says, else the GPU if there is one.

    Raises:
        ModelError: torch cannot use the GPU.
    """
    kind, gpus = job.engine.device, hardware.gpus()
    if kind == "cpu" or (kind == "auto" and not gpus and not torch.cuda.is_available()):
        return hardware.processor()
    cuda.check_usable()
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties().total_memory
    found = next((gpu for gpu in gpus if gpu.name == name), Device("cuda", name))
    return replace(found, memory=memory)


class _Tuning:
    """The order in which a device's variants are tried."""

    def __init__(
        self, job: Job, device: Device, limits: ModelLimits, bench: Bench, budget: Budget
    ) -> None:
        self._bench, self._budget = bench, budget
        self._sweep = Sweep(bench.denoiser, bench.decoder, self._has_time)
        self._most = limits.capacity[device.kind].most
        given = job.engine.dtype
        dtype = advice.dtype_by_rule(device.kind) if given == "auto" else given
        self._dtypes = [dtype] if given != "auto" or dtype != "bfloat16" else ["float32", dtype]
        self._rewrites = [
            name
            for name in registry.load(bench.files.family).REWRITES
            if name != "shared_prefix"  # whose gain depends on the rows' guidance
            and resolve.why_unfit(name, job, bench.files, device.kind, compiled=False) is None
        ]
        layout = advice.layout_by_rule(device.kind, dtype)
        by_rule = limits.lanes(device.kind, job.sampling.height, job.sampling.width)
        self._base = Variant(device.kind, dtype, by_rule, layout, threads=job.engine.threads)

    def _has_time(self, variant: Variant, measurements: int) -> bool:
        return self._budget.left(SWEPT) > measurements * self._bench.cost(variant)

    def on_cpu(self) -> Choice:
        """Try types and layouts, then lanes, threads and decoder calls."""
        others = [
            replace(self._base, dtype=dtype, channels_last=layout)
            for dtype in self._dtypes
            for layout in (True, False)
        ]
        best = self._sweep.fastest(dict.fromkeys([self._base, *others]))
        best = self._sweep.lanes(best, self._most)
        group = self._sweep.group(best) or DECODE_GROUP
        threads = sorted({2, cores.cores()} - {1, best.threads})
        best = self._sweep.rewrites(best, group, self._rewrites)
        fastest = self._sweep.fastest([best, *(replace(best, threads=n) for n in threads)])
        if fastest.threads != best.threads:
            self._bench.show(
                f"{fastest.threads} threads draw most a core: set engine.threads to it."
            )
        self._bench.show("")
        if self._budget.left() < CHECK * self._bench.cost(best):
            self._bench.show("rows: not checked: no time is left; --seconds gives more time.")
            return _choice(best, group, split_k=True)
        torch.set_num_threads(best.threads)
        family = self._bench.family(best.build)
        self._say("rows", differences(family, self._bench.request, best.lanes, group))
        return _choice(best, group, split_k=True)

    def on_gpu(self) -> Choice:
        """Try lanes, kernels of attention, decoder calls, layouts and compiling; check bits."""
        best = self._sweep.lanes(self._base, self._most)
        kernels = (replace(best, attention=name) for name in KERNELS)
        best = self._sweep.fastest([best, *kernels])
        group = self._sweep.group(best) or DECODE_GROUP
        best = self._sweep.fastest([best, replace(best, channels_last=not best.channels_last)])
        best = self._sweep.rewrites(best, group, self._rewrites)
        best = self._compiled(best)
        self._bench.show("")
        split_k = self._check_bits(best, group)
        return _choice(best, group, split_k)

    def _compiled(self, best: Variant) -> Variant:
        """Return the variant compiled, if that is much faster; measured in another process."""
        rewrites = tuple(name for name in best.rewrites if name not in registry.EAGER_REWRITES)
        bench, trial = self._bench, replace(best, compile=True, rewrites=rewrites)
        bench.release()
        plain = next(each.ms for each in reversed(bench.lines) if each.variant == best.text)
        try:
            left = self._budget.left(DONE_COMPILING)
            lines = processes.call(_measure, bench.files, bench.request, trial, seconds=left)
        except CallError as error:
            lines = [Line(trial.text, None, fault=f"cannot run: {error}")]
        for line in lines:
            bench.add(line)
        ms = lines[-1].ms
        return trial if ms is not None and plain is not None and COMPILED * ms < plain else best

    def _check_bits(self, best: Variant, group: int) -> bool:
        """Say whether rows' bits are their own; return engine.split_k, off if that helps."""
        bench = self._bench
        bench.release()
        for split_k in (True, False):
            name = "rows" if split_k else "rows, with engine.split_k: false"
            check = partial(
                processes.call, _check, bench.files, bench.request, best, group, split_k
            )
            try:
                found, first = check(seconds=self._budget.left())
                self._say(name, found)
                if found:
                    continue
            except CallError as error:
                bench.show(f"{name}: not checked: {error}.")
                return True
            try:
                _, second = check(seconds=self._budget.left())
            except CallError as error:
                bench.show(f"{name}: not checked in a second process: {error}.")
                return split_k
            same = "the same" if first == second else "OTHER"
            bench.show(f"{name}: {same} bits in a second process.")
            if first == second:
                return split_k
        bench.show("Images are not exact on this device: their bits depend on more than the row.")
        return True

    def _say(self, name: str, found: list[Difference]) -> None:
        if not found:
            self._bench.show(f"{name}: their bits depend neither on place nor on neighbours.")
        for each in found:
            self._bench.show(
                f"{name}: {each.rows} of the {each.call} differ when {each.change}, by at most "
                f"{each.greatest:.2g}."
            )


def _measure(files: ModelFiles, request: Request, variant: Variant) -> list[Line]:
    """Return the line of a variant, measured in this process."""
    bench = Bench(files, request, lambda _: None)
    try:
        bench.denoiser(variant)
    except OutOfMemory:
        return [replace(bench.lines[-1], ms=None, fault="too little memory is left")]
    return bench.lines


def _check(
    files: ModelFiles, request: Request, variant: Variant, group: int, split_k: bool
) -> tuple[list[Difference], dict[str, str]]:
    """Return what changes the bits of a variant's rows, and their hashes, in this process."""
    cuda.allow_split_k(split_k)
    build = replace(variant.build, attention=variant.attention)
    family = Bench(files, request, lambda _: None).family(build)
    return (
        differences(family, request, variant.lanes, group),
        hashes(family, request, variant.lanes, group),
    )


def _choice(best: Variant, group: int, split_k: bool) -> Choice:
    return Choice(
        lanes=best.lanes,
        dtype=best.dtype,
        channels_last=best.channels_last,
        compile=best.compile,
        attention=best.attention,
        decode_group=group,
        split_k=split_k,
        rewrites=list(best.rewrites),
    )


def _describe(choice: Choice) -> str:
    values = ", ".join(f"{name}: {str(value).lower()}" for name, value in vars(choice).items())
    return f"engine: {{{values}}}"
