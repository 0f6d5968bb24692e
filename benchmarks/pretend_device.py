"""A pretend device: its tensors say `pretend:0`, compute on the CPU, and log what a GPU would do.

`with pretend_device.active() as log:` registers it with torch; then load a model for the device
`pretend` and draw. The log has the kernels, the host's waits and the tensors on the wrong device,
each with the line of sdbatch that causes it. It shows which line waits; it says nothing of speed,
and its bits are the CPU's.
"""

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
CPU = torch.device("cpu")
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# Operations whose result the host needs, or whose shape depends on values; and solvers, which
# check on the host whether they succeeded.
WAITS = frozenset(
    {
        *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere"),
        *("masked_select", "unique", "_unique", "_unique2", "unique_consecutive", "unique_dim"),
        *("bincount", "histc", "multinomial", "_linalg_solve_ex", "linalg_solve", "linalg_inv"),
        *("_linalg_check_errors", "linalg_cholesky", "linalg_eigh"),
    }
)
# Neither views nor kernels.
FREE = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"),
        *("detach_", "lift", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias"),
        *("_has_compatible_shallow_copy_type", "resize_", "set_"),
    }
)


@dataclass
class Log:
    """What code on the device did. Each counts by what it was and where."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)  # of the host for the device
    mismatches: Counter[str] = field(default_factory=Counter)  # operations of two devices
    copies: Counter[str] = field(default_factory=Counter)  # between host and device, not waited for

    def clear(self) -> None:
        """Forget everything."""
        for counter in (self.kernels, self.waits, self.mismatches, self.copies):
            counter.clear()


log = Log()
_lock = threading.Lock()  # the engine's threads log, too


class PretendTensor(torch.Tensor):
    """A tensor of the device; its values are in `inner`."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> "PretendTensor":
        """Wrap a tensor of the CPU."""
        with torch.inference_mode(False):  # or torch does not let views of weights be made
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(NAME, 0),
            )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        """Return the values."""
        return f"PretendTensor({self.inner})"

    def tolist(self) -> Any:
        """Copy the values to the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _compute(func, args, kwargs or {})


class _CountKernels(TorchDispatchMode):
    """Counts the operations that an operation on the CPU consists of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        name = _name(func)
        if not func.is_view and name not in FREE | WAITS:
            _count(log.kernels, name)
        return func(*args, **(kwargs or {}))


@cache
def _is_composite(func: Any) -> bool:
    return bool(func.has_kernel_for_dispatch_key(COMPOSITE))


def _name(func: Any) -> str:
    name: str = func._schema.name.split("::")[-1]
    return name


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Make a call with tensors of the device, or one that makes them."""
    name = _name(func)
    if name == "copy_":
        return _copy(*args, **kwargs)
    if name == "to":  # a copy between devices, perhaps
        return func.decompose(*args, **kwargs)
    flat, _ = tree_flatten((args, kwargs))
    here = [each for each in flat if isinstance(each, PretendTensor)]
    there = [
        each
        for each in flat
        if isinstance(each, torch.Tensor) and not isinstance(each, PretendTensor)
    ]
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": CPU}
    if name == "_to_copy" and device is not None and torch.device(device).type == "cpu":
        counter = log.copies if kwargs.get("non_blocking") else log.waits
        _count_place(counter, f"to the host {tuple(here[0].shape)}")
        return func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    _check(name, args, here, there)
    with _CountKernels():
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.is_mutable:
        return kwargs["out"] if "out" in kwargs else args[0]
    return tree_map(_wrap, out)


def _check(name: str, args: Any, here: list[Any], there: list[Any]) -> None:
    """Log an operation that waits, or whose tensors are on two devices."""
    if name in WAITS:
        _count_place(log.waits, name)
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _count_place(log.waits, f"{name} by a mask")
        if any(not isinstance(index, PretendTensor) for index in indices):
            _count_place(log.waits, f"{name} by indices on the host")
            there = [each for each in there if all(each is not index for index in indices)]
    gather = name in ("cat", "stack", "gather", "index_select", "index_copy")
    if here and any(each.dim() or gather for each in there):
        shapes = ", ".join(str(tuple(each.shape)) for each in there)
        _count_place(log.mismatches, f"{name} with {shapes} of the CPU")


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy values within the device, or between it and the host."""
    if isinstance(target, PretendTensor) and isinstance(source, PretendTensor):
        _count(log.kernels, "copy_")
    else:
        host, way = (source, "to") if isinstance(target, PretendTensor) else (target, "from")
        swift = non_blocking and host.is_pinned()
        _count_place(
            log.copies if swift else log.waits, f"copy {way} the device {tuple(host.shape)}"
        )
    _inner(target).copy_(_inner(source))
    return target


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _wrap(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if is_plain else value


def _count(counter: Counter[str], name: str) -> None:
    with _lock:
        counter[name] += 1


def _count_place(counter: Counter[str], what: str) -> None:
    _count(counter, f"{what} @ {_place()}")


def _place() -> str:
    """Return the line of sdbatch that is at work, and the line of a library that it called."""
    inner = ""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" in path.parts or path == Path(__file__):
            continue
        if "sdbatch" in path.parts and path.name != "host_scalars.py":
            return f"{path.name}:{frame.lineno}" + (f" ({inner})" if inner else "")
        inner = inner or f"{path.name}:{frame.lineno}"
    return inner


class _Module(_DummyBackendModule):
    """What torch.random.fork_rng asks every device for, long after a test."""

    def get_rng_state(self, device: int) -> torch.Tensor:
        """Return the state of a generator that nothing draws from."""
        return torch.empty(0)

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        """Do nothing."""


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _active


_active = False


@cache
def _register() -> list[torch.library.Library]:
    """Register the device with torch, which cannot be undone."""
    _setup_privateuseone_for_python_backend(rename=NAME, hook=_Hook(), backend_module=_Module())
    rest, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), "PrivateUse1")
    # within torch.tensor, which disables the dispatch to Python
    own.impl("_copy_from", lambda source, target, _=False: _copy(target, source), "PrivateUse1")
    return [rest, own]


@contextmanager
def active() -> Iterator[Log]:
    """Let torch use the device in the block; yields the log, which is empty."""
    global _active
    _register()
    _device_constructors()  # kept by torch from its first call on, so not with the patches below
    log.clear()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    patches = [
        (torch.Tensor, "pin_memory", _pin_memory),
        (torch.Tensor, "is_pinned", lambda tensor: getattr(tensor, "pretends_pinned", False)),
        (torch, "empty", _empty),
        (torch, "Event", _Event),
    ]
    originals = [(where, name, getattr(where, name)) for where, name, _ in patches]
    for where, name, patch in patches:  # these need the driver of a real device
        setattr(where, name, patch)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _active = True
    try:
        yield log
    finally:
        _active = False
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for where, name, original in originals:
            setattr(where, name, original)


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    pinned: Any = tensor.clone()
    pinned.pretends_pinned = True
    return pinned


_torch_empty = torch.empty


def _empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    made: Any = _torch_empty(*size, **options)
    if pin_memory:
        made.pretends_pinned = True
    return made  # type: ignore[no-any-return]


class _Event:
    """An event of the device, whose work is always done."""

    def __init__(self, device: torch.device, *, blocking: bool = False) -> None:
        assert device.type == NAME

    def record(self) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""
