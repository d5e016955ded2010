"""Choose the backend for a call, and say why when none fits."""

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("chunked",)  # the first that supports the tensors wins

logger = logging.getLogger("metal_ops")


def load(name: str) -> ModuleType:
    """The backend's module; imported when first asked for.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    return importlib.import_module(f"metal_ops.backends.{name}")


@functools.cache
def _log_choice(name: str, device: str, dtype: str, refused: str) -> None:
    logger.info("backend %s: %s tensors, %s%s", name, device, dtype, refused)


def select(name: str, student: Tensor, teacher: Tensor) -> ModuleType:
    """The named backend, or for "auto" the first that supports the tensors.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: no candidate supports the tensors; the message gives each reason.
    """
    reasons: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        backend = load(candidate)
        reason = backend.unsupported(student, teacher)
        if reason is None:
            refused = "".join(f"; not {n}: {r}" for n, r in reasons.items())
            _log_choice(candidate, student.device.type, str(student.dtype), refused)
            return backend
        reasons[candidate] = reason
    raise NotImplementedError(
        f"no backend for {tuple(student.shape)} {student.dtype} on {student.device}: "
        + "; ".join(f"{n}: {r}" for n, r in reasons.items())
    )


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Every backend by name, with None if it takes float32 tensors of `device`, else the reason."""
    probe = torch.empty(0, 1, device=device)
    return {name: load(name).unsupported(probe, probe) for name in BACKENDS}
