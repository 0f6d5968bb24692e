"""From a job to what draws it: the model found, every `auto` replaced, the engine made.

For the batch run and the service alike. No torch is loaded before an engine is made.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sdbatch import hardware, registry, tuned
from sdbatch.advice import Advice, advise, dtype_by_rule, layout_by_rule
from sdbatch.engine.limits import DECODE_GROUP, ModelLimits
from sdbatch.engine.request import EngineProtocol, Request
from sdbatch.errors import JobError, ModelError, one_line
from sdbatch.job import EngineSettings, Growing, Job
from sdbatch.job.files import NamedFile, named_files, with_paths
from sdbatch.models import find_model as models
from sdbatch.models import hub
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.identify import EDITING
from sdbatch.sampling import KEYS

if TYPE_CHECKING:
    from sdbatch.engine.engine import Engine
    from sdbatch.engine.family import Family

MakeEngine = Callable[[], EngineProtocol]
FOUND = ("revision", "variant", "prediction_type", "zero_snr")  # of a model, by its files
ANY_GPU = ""  # of EngineConfig.lanes: every device


@dataclass(frozen=True)
class EngineConfig:
    """The engine settings of a job with nothing left open."""

    device: str  # cpu, cuda
    dtype: str
    lanes: Mapping[str, int]  # type of GPU -> lanes; ANY_GPU where all have the same number
    threads: int
    channels_last: bool
    compile: bool
    attention: str = "torch"
    decode_group: int = DECODE_GROUP
    split_k: bool = True
    rewrites: tuple[str, ...] = ()
    fp8_linears: bool = False

    @property
    def most_lanes(self) -> int:
        """Return the lanes of the device with most of them."""
        return max(self.lanes.values())

    @property
    def build(self) -> Build:
        """Return how the model is laid out on the device."""
        return Build(
            self.device,
            self.dtype,
            self.channels_last,
            self.compile,
            self.attention,
            self.rewrites,
            self.fp8_linears,
        )


@dataclass(frozen=True)
class Resolved:
    """A job with nothing left open."""

    job: Job  # with every value below written into it, as job.yaml records it
    model: ModelFiles
    engine: EngineConfig
    lanes_by: str = field(default="", compare=False)  # where their number is from, for people

    def make_engine(self, columns: Collection[str] = ()) -> MakeEngine:
        """Return what makes an engine in another process.

        Args:
            columns: of the prompt table, by our names. Where they can replace no value that the
                model may reject, an engine that rejects the job's own values is not made.
        """
        replaceable = any(KEYS[name].model_may_reject for name in columns if name in KEYS)
        example = Request(**{**self.job.sampling.model_dump(), "prompt": ""})
        return partial(load_engine, self.model, self.engine, example, must_draw=not replaceable)


def find_model(job: Job) -> tuple[ModelFiles, Job]:
    """Find the job's model; record in the job what identifies it and how it was trained.

    Raises:
        ModelError: there is none, or it is not a model that a family loads.
    """
    files = models.find_model(job.model, job.safety)
    if job.model.sha256 and not models.hashed_files(files):
        raise ModelError(
            "model.sha256 = given: only local files have one, and no local file is loaded. Leave "
            "it out; the commit of a hub id is its model.revision."
        )
    if job.safety.policy != "flag" and files.checker is None:
        raise ModelError(
            f"safety.policy = {job.safety.policy!r}: the model has no safety checker. Set "
            f"safety.checker to a checker's folder, or the policy to flag."
        )
    found = files.settings
    model = with_paths(job.model, partial(_pinned, {f.key: f.path for f in named_files(found)}))
    values = {name: getattr(found, name) for name in FOUND}
    return files, job.updated(model=model.updated(**values))


def _pinned(found: Mapping[str, str], file: NamedFile) -> str:
    """Return a file's path as the job says it; of the hub, with the commit that was found."""
    is_on_hub = file.kind.hub and hub.parse(found[file.key]) is not None
    return found[file.key] if is_on_hub else file.path


def resolve(
    job: Job,
    files: ModelFiles,
    gpus: float,
    sha256: str | None,
    gpu_types: Collection[str] = (),
) -> Resolved:
    """Replace every `auto` of a job and record the hash of the model's weights.

    Args:
        job: from `find_model`.
        files: of its model.
        gpus: of the machines that may draw.
        sha256: of the files.
        gpu_types: Ray's names of the GPUs' types; none: those of this machine.

    Raises:
        JobError: the job's device is missing, or lacks what the job sets.
        ModelError: the weights are not those that the job or the existing output names.
    """
    if job.model.sha256 not in (None, sha256):
        raise ModelError(
            f"model.path = {job.model.path}: the sha256 of its weights is {sha256}: must be "
            f"{job.model.sha256}, as the job or the existing output says. Restore the weights, or "
            f"choose another output.path."
        )
    device = _resolve_device(job, gpus)
    advice = advise(job, files, device, sha256, gpu_types)
    engine = _resolve_engine(job, files, device, advice)
    lanes = dict(engine.lanes)
    recorded = EngineSettings.model_validate(
        {
            **vars(engine),
            "lanes": lanes.get(ANY_GPU, lanes),
            "rewrites": list(engine.rewrites),
        }
    )
    job = job.updated(model=job.model.updated(sha256=sha256), engine=recorded)
    files = replace(files, expected_sha256=sha256 or files.expected_sha256)
    return Resolved(job, files, engine, f"{_count(engine)} {advice.source}")


def describe_lanes(job: Job, files: ModelFiles) -> str:
    """Return how many lanes the job would have on this machine, and where that is from."""
    gpus = len(hardware.gpus()) or int(job.engine.device == "cuda")
    if job.engine.device == "auto" and isinstance(job.cluster.actors, Growing) and not gpus:
        return "lanes by the device of the cluster's nodes"
    tuned_here = any(entry.key.height == job.sampling.height for entry in tuned.read()[0])
    sha256 = models.sha256(files) if tuned_here else None  # takes seconds, unless it was tuned
    return resolve(job.updated(model=job.model.updated(sha256=None)), files, gpus, sha256).lanes_by


def _resolve_device(job: Job, gpus: float) -> str:
    device: str = job.engine.device
    grows = isinstance(job.cluster.actors, Growing)
    if device == "auto":
        if grows and not gpus:
            raise JobError(
                "engine.device = 'auto': the cluster grows and has no GPU yet, so the device of "
                "its future nodes is unknown. Set cuda or cpu."
            )
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus and not grows:
        raise JobError("engine.device = 'cuda': the cluster has no GPU. Set cpu, or add a GPU.")
    if device == "cpu" and job.engine.attention in ("cudnn", "efficient"):
        raise JobError(
            f"engine.attention = {job.engine.attention!r}: is a kernel of GPUs: must be auto, "
            f"torch, flash or math on a CPU. Leave it out."
        )
    return device


def _resolve_engine(job: Job, files: ModelFiles, device: str, advice: Advice) -> EngineConfig:
    settings, choice = job.engine, advice.choice

    def value(name: str, by_rule: Any) -> Any:
        given = getattr(settings, name)
        if given != "auto":
            return given
        return by_rule if choice is None else getattr(choice, name)

    dtype: str = value("dtype", dtype_by_rule(device))
    if settings.fp8_linears:
        dtype = _dtype_of_fp8(settings, device)
    group: int = value("decode_group", DECODE_GROUP)
    lanes = _lanes(job, files, device, advice, dtype, group)
    compiled: bool = value("compile", by_rule=False)
    return EngineConfig(
        device=device,
        dtype=dtype,
        lanes=lanes,
        threads=settings.threads,
        channels_last=value("channels_last", layout_by_rule(device, dtype)),
        compile=compiled,
        attention=value("attention", "torch"),
        decode_group=group,
        split_k=value("split_k", by_rule=True),
        rewrites=_rewrites(job, files, device, choice, compiled=compiled),
        fp8_linears=settings.fp8_linears,
    )


def _lanes(
    job: Job, files: ModelFiles, device: str, advice: Advice, dtype: str, group: int
) -> dict[str, int]:
    """Return the lanes by type of GPU; raise a JobError if the job sets too few for an image."""
    given, least = job.engine.lanes, files.image_lanes
    if given == "auto":
        limits: ModelLimits = registry.load(files.family).LIMITS
        memory = advice.memory / 2 if dtype == "float32" else advice.memory
        size = (job.sampling.height, job.sampling.width)
        found = limits.lanes(device, *size, memory, group)
        if advice.choice is not None:
            found = advice.choice.lanes
        return {ANY_GPU: max(least, found)}
    lanes = given if isinstance(given, dict) else {ANY_GPU: given}
    if min(lanes.values()) < least:
        raise JobError(
            f"engine.lanes = {given!r}: must be at least {least}, the lanes of an image of this "
            f"model. Leave it out."
        )
    return lanes


def _dtype_of_fp8(settings: EngineSettings, device: str) -> str:
    """Return the type of the other weights; raise a JobError if 8 bits cannot be multiplied."""
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    if (device, dtype) != ("cuda", "bfloat16"):
        raise JobError(
            f"engine.fp8_linears = True: the engine draws on {device} in {dtype}: must be on cuda "
            f"in bfloat16. Set engine.device and engine.dtype so, or leave fp8_linears out."
        )
    return dtype


def _count(engine: EngineConfig) -> str:
    return f"{engine.most_lanes} lanes" if len(engine.lanes) == 1 else "lanes by type"


def _rewrites(
    job: Job, files: ModelFiles, device: str, choice: tuned.Choice | None, *, compiled: bool
) -> tuple[str, ...]:
    """Return the rewrites that the job names, else those of tune's choice that fit the job."""
    given = job.engine.rewrites
    if given == "auto":
        chosen = [] if choice is None else choice.rewrites
        reasons = {name: why_unfit(name, job, files, device, compiled=compiled) for name in chosen}
        return tuple(sorted(name for name, reason in reasons.items() if reason is None))
    for name in given:
        reason = why_unfit(name, job, files, device, compiled=compiled)
        if reason is not None:
            raise JobError(f"engine.rewrites = {name!r}: {reason}. Leave {name} out.")
    return tuple(sorted({*given}))


def why_unfit(
    rewrite: str, job: Job, files: ModelFiles, device: str, *, compiled: bool
) -> str | None:
    """Return why a job cannot be drawn with a rewrite; None if it can."""
    known = registry.load(files.family).REWRITES
    on_cuda = rewrite in registry.CUDA_REWRITES
    loras = "model.loras has names, so weights change from tick to tick: must have none"
    reasons = {
        f"must be one of this model: {', '.join(known) or 'it has none'}": rewrite not in known,
        f"engine.device is {device}: must be cuda": on_cuda and device != "cuda",
        "engine.compile is true, set or tuned: must be false": (
            rewrite in registry.EAGER_REWRITES and compiled
        ),
        "graphs is in the list too: must be one of the two": (
            rewrite == "shared_prefix" and "graphs" in job.engine.rewrites
        ),
        loras: rewrite == "graphs" and bool(job.model.row_loras),
        "the lanes of an edit differ in their picture: must have equal inputs": (
            rewrite == "shared_prefix" and files.use == EDITING
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def load_engine(
    files: ModelFiles, config: EngineConfig, example: Request, *, must_draw: bool
) -> EngineProtocol:
    """Load the model, start an engine and draw a tick with it, in the process that draws.

    Args:
        files: of the model.
        config: its lanes may depend on the GPU that this process has.
        example: a request with the job's values; the lanes are meant for its size.
        must_draw: whether an engine is of no use whose model rejects the example.

    Raises:
        ModelError: the device cannot be used, the environment overrides what decides bits, or the
            model cannot be loaded or cannot draw.
    """
    from sdbatch.engine import bits, cuda
    from sdbatch.engine.engine import Engine
    from sdbatch.models import compile_lock
    from sdbatch.models.deferred import deferred_imports

    if config.device == "cuda":
        cuda.check_usable()
    bits.pin_bits(config.device)
    if config.compile:
        compile_lock.bound_threads()
    lanes = config.lanes.get(ANY_GPU) or cuda.lanes(config.lanes, cuda.name(config.device))
    models.check_hash(files)
    cuda.allow_split_k(config.split_k)
    with deferred_imports(compile=config.compile):
        from sdbatch.models import safety_checker

        family: Family = registry.load(files.family).load(files, config.build)
        example = with_picture(example, files)
        checker = safety_checker.load(files, config.build)
    engine = Engine(
        family,
        lanes=lanes,
        threads=config.threads,
        pixels=example.height * example.width,
        checker=checker,
        decode_group=config.decode_group,
    )
    try:
        with compile_lock.compiling_alone() if config.compile else nullcontext():
            _try_out(engine, example, must_draw=must_draw)
    except ModelError:
        engine.close()
        raise
    cuda.check_headroom(family.device)
    return engine


def with_picture(example: Request, files: ModelFiles) -> Request:
    """Return an example with a black picture, if the model draws nothing without one."""
    if files.use != EDITING:
        return example
    black = np.zeros((example.height, example.width, 3), np.uint8)
    return example.model_copy(update={"inputs": {"image": black}})


def _try_out(engine: "Engine", example: Request, *, must_draw: bool) -> None:
    try:
        engine.check(example)
    except Exception as error:
        if must_draw:
            text = one_line(error).rstrip(".")
            raise ModelError(f"sampling: the model cannot draw this: {text}.") from error
        return  # each row has values of its own
    engine.warm_up(example)
