"""From a job to what draws it: the model found, every `auto` replaced, the engine made.

For the batch run and the service alike. No torch is loaded before an engine is made.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from sdbatch import cores, registry
from sdbatch.engine.limits import ModelLimits
from sdbatch.engine.request import EngineProtocol, Request
from sdbatch.errors import JobError, ModelError, one_line
from sdbatch.job import EngineSettings, Growing, Job
from sdbatch.job.files import NamedFile, named_files, with_paths
from sdbatch.models import find_model as models
from sdbatch.models import hub
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
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

    @property
    def most_lanes(self) -> int:
        """Return the lanes of the device with most of them."""
        return max(self.lanes.values())

    @property
    def build(self) -> Build:
        """Return how the model is laid out on the device."""
        return Build(self.device, self.dtype, self.channels_last, self.compile)


@dataclass(frozen=True)
class Resolved:
    """A job with nothing left open."""

    job: Job  # with every value below written into it, as job.yaml records it
    model: ModelFiles
    engine: EngineConfig

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


def resolve(job: Job, files: ModelFiles, gpus: float, sha256: str | None) -> Resolved:
    """Replace every `auto` of a job and record the hash of the model's weights.

    Args:
        job: from `find_model`.
        files: of its model.
        gpus: of the machines that may draw.
        sha256: of the files.

    Raises:
        JobError: the job's device is missing.
        ModelError: the weights are not those that the job or the existing output names.
    """
    if job.model.sha256 not in (None, sha256):
        raise ModelError(
            f"model.path = {job.model.path}: the sha256 of its weights is {sha256}: must be "
            f"{job.model.sha256}, as the job or the existing output says. Restore the weights, or "
            f"choose another output.path."
        )
    limits: ModelLimits = registry.load(files.family).LIMITS
    engine = _resolve_engine(job, limits, gpus)
    lanes = dict(engine.lanes)
    recorded = EngineSettings.model_validate({**vars(engine), "lanes": lanes.get(ANY_GPU, lanes)})
    job = job.updated(model=job.model.updated(sha256=sha256), engine=recorded)
    return Resolved(job, replace(files, expected_sha256=sha256 or files.expected_sha256), engine)


def _resolve_engine(job: Job, limits: ModelLimits, gpus: float) -> EngineConfig:
    settings, sampling = job.engine, job.sampling
    device: str = settings.device
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
    lanes = settings.lanes
    if lanes == "auto":
        lanes = limits.lanes(device, sampling.height, sampling.width)
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = (
            "float16" if device == "cuda" else "bfloat16" if cores.have_bfloat16() else "float32"
        )
    channels_last = settings.channels_last
    if channels_last == "auto":  # by benchmarks/lanes.py
        channels_last = (device, dtype) != ("cpu", "bfloat16")
    return EngineConfig(
        device=device,
        dtype=dtype,
        lanes=lanes if isinstance(lanes, dict) else {ANY_GPU: lanes},
        threads=settings.threads,
        channels_last=channels_last,
        compile=settings.compile is True,  # auto: no
    )


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
    from sdbatch.models.deferred import deferred_imports

    if config.device == "cuda":
        cuda.check_usable()
    bits.pin_bits(config.device)
    lanes = config.lanes.get(ANY_GPU) or cuda.lanes(config.lanes, cuda.name(config.device))
    models.check_hash(files)
    with deferred_imports(compile=config.compile):
        from sdbatch.models import safety_checker

        family: Family = registry.load(files.family).load(files, config.build)
        checker = safety_checker.load(files, config.build)
    engine = Engine(
        family,
        lanes=lanes,
        threads=config.threads,
        pixels=example.height * example.width,
        checker=checker,
    )
    try:
        _try_out(engine, example, must_draw=must_draw)
    except ModelError:
        engine.close()
        raise
    cuda.check_headroom(family.device)
    return engine


def _try_out(engine: "Engine", example: Request, *, must_draw: bool) -> None:
    try:
        engine.check(example)
    except Exception as error:
        if must_draw:
            text = one_line(error).rstrip(".")
            raise ModelError(f"sampling: the model cannot draw this: {text}.") from error
        return  # each row has values of its own
    engine.warm_up(example)
