"""Call an op on the backend that fits, say why when none does, and get by without a kernel.

Three environment variables are read at every call; they are off if unset, empty or "0".
METAL_OPS_COMPILE=1: "auto" takes the compiled backend before the chunked one, for what was measured
to be faster there.
METAL_OPS_STRICT=1: a kernel that cannot be compiled or launched raises, also under "auto".
METAL_OPS_CHECK=1: the chunked backend repeats every call of another one, and results that differ
by more than `backends.compare` allows raise. Slow, and with the memory of both.
"""

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops.backends import KERNEL_DEVICES, compare
from metal_ops.backends.errors import KernelError
from metal_ops.backends.machine import describe
from metal_ops.spec import DivergenceSpec

# the first that supports the tensors wins; each is a module of metal_ops.backends
BACKENDS = ("metal", "triton", "compiled", "chunked")

logger = logging.getLogger("metal_ops")


class Case(NamedTuple):
    """Stands for all calls that need the same kernels, as far as is known outside of a backend."""

    op: str
    kind: str
    device: str
    student: torch.dtype
    teacher: torch.dtype


_refusals: dict[Case, dict[str, str]] = {}  # backends whose kernels failed, and how
_choices: dict[str, str] = {}  # the backend that did the work last, by what was asked for
_warned: set[tuple[str, str]] = set()  # (backend, kernel)


def load(name: str) -> ModuleType:
    """Import a backend's module when it is first asked for.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    return importlib.import_module(f"{__package__}.backends.{name}")


@functools.cache
def _log_choice(name: str, device: str, dtype: str, refused: str) -> None:
    logger.info("backend %s: %s tensors, %s%s", name, device, dtype, refused)


def _elsewhere(name: str, device: str) -> str | None:
    """Say why a backend has no kernels for a device, without asking it, or None."""
    known = KERNEL_DEVICES.get(name, (device,))
    if device in known or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"needs tensors on {' or '.join(known)}, got {device}"


def _switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _not_unasked(name: str) -> str | None:
    """Say why "auto" does not take a backend that would have to be named, or None."""
    if name == "compiled" and not _switch("METAL_OPS_COMPILE"):
        return 'compiles for seconds at first use; "auto" takes it where METAL_OPS_COMPILE=1'
    return None


def consider(
    name: str, student: Tensor, teacher: Tensor, failed: Mapping[str, str]
) -> tuple[str | None, dict[str, str]]:
    """Find the backend that takes the tensors (None for none), and reasons against those before."""
    reasons: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        reason = _not_unasked(candidate) if name == "auto" else None
        reason = reason or failed.get(candidate) or _elsewhere(candidate, student.device.type)
        reason = reason or load(candidate).unsupported(student, teacher)
        if reason is None:
            return candidate, reasons
        reasons[candidate] = reason
    return None, reasons


def select(
    name: str, student: Tensor, teacher: Tensor, failed: Mapping[str, str] | None = None
) -> ModuleType:
    """Return the named backend, or for "auto" the first that supports the tensors.

    Args:
        name: "auto" or one of BACKENDS.
        student: whose device and dtype, with those of
        teacher: decide.
        failed: reasons against backends that were tried before.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: no candidate supports the tensors; the message gives each reason.
    """
    chosen, reasons = consider(name, student, teacher, failed or {})
    if chosen is None:
        raise NotImplementedError(
            f"no backend for {tuple(student.shape)} {student.dtype} on {student.device}: "
            + "; ".join(f"{n}: {r}" for n, r in reasons.items())
        )
    refused = "".join(f"; not {n}: {r}" for n, r in reasons.items())
    _log_choice(chosen, student.device.type, str(student.dtype), refused)
    return load(chosen)


def _label(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]


def _warn(backend: str, error: KernelError, device: torch.device) -> None:
    if (backend, error.kernel) in _warned:
        return
    _warned.add((backend, error.kernel))
    warnings.warn(
        f"the {backend} backend of metal_ops failed and another one, slower, takes its place in "
        f"this process (METAL_OPS_STRICT=1 raises instead). Please report this: "
        f"{describe(device)}; kernel {error.kernel}: {error.text}",
        RuntimeWarning,
        stacklevel=3,
    )


def _slower(name: str, op: str, spec: DivergenceSpec | None) -> dict[str, str]:
    """Say why "auto" leaves this work to a later backend, although that one could do it."""
    if name != "auto" or "compiled" not in BACKENDS or not _switch("METAL_OPS_COMPILE"):
        return {}
    reason = load("compiled").slower(op, spec)
    return {} if reason is None else {"compiled": reason}


def _describe_work(case: Case, spec: DivergenceSpec | None) -> str:
    details = []
    if spec is not None and spec.support != "full":
        details.append(spec.support)
    if spec is not None and spec.clip is not None:
        details.append(f"clip {spec.clip_level}")
    return " ".join(str(x) for x in (*case[:2], *details, *case[2:]) if x)


def choices() -> dict[str, str]:
    """Return the backend that did the work last in this process, by work: op, kind, dtypes, device.

    A run in which nothing fails has one choice for each. Two runs with equal choices, on one
    machine, have computed by the same code.
    """
    return dict(_choices)


def _call(backend: ModuleType, op: str, args: tuple[Any, ...]) -> Any:
    check = _switch("METAL_OPS_CHECK") and _label(backend) != "chunked"
    # first, so that it sees the inputs as they were given
    want = getattr(load("chunked"), op)(*args) if check else None
    got = getattr(backend, op)(*args)
    if check:
        compare.require_equal(op, _label(backend), args, got, want)
    return got


def run(op: str, name: str, student: Tensor, teacher: Tensor, *args: Any) -> Any:
    """Call a backend's function `op` with `args`, on the backend that `select` gives.

    Where a kernel of a backend that "auto" took cannot be compiled or launched, the next backend
    does the work, in this call and in all like it, with one warning a kernel.

    Raises:
        KernelError: it cannot, and the backend was named or METAL_OPS_STRICT is set.
        ValueError, NotImplementedError: as `select`.
        RuntimeError: METAL_OPS_CHECK is set and the results differ.
    """
    spec = next((x for x in args if isinstance(x, DivergenceSpec)), None)
    kind = next((x for x in args if isinstance(x, str)), "") if spec is None else spec.kind
    case = Case(op, kind, student.device.type, student.dtype, teacher.dtype)
    lenient = name == "auto" and not _switch("METAL_OPS_STRICT")
    failed, slower = dict(_refusals.get(case, {})) if lenient else {}, _slower(name, op, spec)
    while True:
        backend = select(name, student, teacher, slower | failed)
        try:
            found = _call(backend, op, args)
            _choices[_describe_work(case, spec)] = _label(backend)
            return found
        except KernelError as error:
            if not lenient or _label(backend) in failed:
                raise
            _warn(_label(backend), error, student.device)
            failed[_label(backend)] = str(error)
            _refusals[case] = failed


def failures(functions: tuple[str, ...], student: Tensor) -> dict[str, str]:
    """Say which backends' kernels for these functions have failed in this process, and how."""
    return {
        name: text
        for case, found in _refusals.items()
        if case.op in functions
        and (case.device, case.student) == (student.device.type, student.dtype)
        for name, text in found.items()
    }


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Map every backend to None if it takes float32 tensors of `device`, else to the reason."""
    probe = torch.empty(0, 1, device=device)
    return {name: load(name).unsupported(probe, probe) for name in BACKENDS}
