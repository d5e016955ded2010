"""Says what this machine has, and which backend takes what on it."""

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metal_ops import _dispatch
from metal_ops.backends.blocks.sizes import l2_bytes
from metal_ops.backends.machine import chip, device_name, system
from metal_ops.functional import (
    Head,
    SparseTeacher,
    divergence,
    hidden_divergence,
    linear_divergence,
    sparse_divergence,
    weighted_divergence,
)
from metal_ops.spec import DivergenceSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PACKAGES = ("triton", "transformers", "hf-distill")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[torch.device]:
    """List the accelerator, if there is one, and the CPU."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            found.insert(0, torch.device(accelerator.type))
    return found


def versions() -> dict[str, Any]:
    """List what a report needs to be understood."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": system(),
        "chip": chip(),
        "accelerators": [device_name(d) for d in devices() if d.type != "cpu"],
        **{name: _version(name) for name in PACKAGES},
    }


def _calls(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Make a tiny call of each op, forward and backward."""
    x = torch.randn(2, 8, device=device).to(dtype).requires_grad_()
    y = torch.randn(2, 8, device=device).to(dtype)
    ids = torch.tensor([[0, 1], [2, 3]], device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    minus = torch.full((2, 2), -2.0, dtype=wide, device=device)
    known, spec = SparseTeacher(ids, minus, minus[:, 0]), DivergenceSpec("jsd")
    ones = torch.ones(2, dtype=wide, device=device)
    return {
        "divergence": lambda: divergence(x, y, spec),
        "weighted": lambda: weighted_divergence(x, y, spec, weights=ones).loss,
        "sparse": lambda: sparse_divergence(x, known, spec),
        "linear": lambda: linear_divergence(x, Head(x), y, Head(y), spec, weights=ones).loss,
        "hidden": lambda: hidden_divergence(x, y, "cosine"),
    }


# the backends' functions that an op calls
FUNCTIONS = {
    "divergence": ("forward", "backward"),
    "weighted": ("forward",),
    "sparse": ("sparse",),
    "linear": ("linear",),
    "hidden": ("hidden_states",),
}


def _choice(op: str, call: Callable[[], Tensor], probe: Tensor) -> tuple[str, dict[str, str]]:
    """Return (what did it, the reasons against those before); kernels are compiled to know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel that fails is among the reasons
        call().sum().backward()
    failed = _dispatch.failures(FUNCTIONS[op], probe)
    chosen, reasons = _dispatch.consider("auto", probe, probe, failed)
    return chosen or "none", reasons


def choices(device: torch.device) -> dict[tuple[str, str], tuple[str, dict[str, str]]]:
    """Find by (op, dtype) the backend that "auto" takes, and why not those before it."""
    found = {}
    for dtype in DTYPES:
        if device.type == "mps" and dtype == torch.float64:
            continue  # MPS has none
        probe = torch.empty(0, 1, dtype=dtype, device=device)
        for op, call in _calls(device, dtype).items():
            found[op, str(dtype).removeprefix("torch.")] = _choice(op, call, probe)
    return found


def _show_choices(device: torch.device) -> None:
    found = choices(device)
    dtypes = list(dict.fromkeys(dtype for _, dtype in found))
    print(f'\n{device}: the backend that "auto" takes, tried on a small input')
    print(f"{'':12}" + "".join(f"{dtype:>10}" for dtype in dtypes))
    for op in FUNCTIONS:
        print(f"{op:12}" + "".join(f"{found[op, dtype][0]:>10}" for dtype in dtypes))
    why: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for call, (_, reasons) in found.items():
        for reason in reasons.items():
            why.setdefault(reason, []).append(call)
    for (name, reason), calls in why.items():
        which = ", ".join(_named(calls, len(FUNCTIONS)))
        print(f"not {name} for {which}: {reason}")


def _named(calls: list[tuple[str, str]], num_ops: int) -> list[str]:
    """Name calls (op, dtype), those of all ops by the dtype alone."""
    by_dtype: dict[str, list[str]] = {}
    for op, dtype in calls:
        by_dtype.setdefault(dtype, []).append(op)
    return [
        dtype if len(ops) == num_ops else f"{dtype} ({', '.join(ops)})"
        for dtype, ops in by_dtype.items()
    ]


def show() -> None:
    """Print what this machine has and the choices on each of its devices."""
    for name, value in versions().items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:14}{text or 'none'}")
    print(f"{'threads':14}{torch.get_num_threads()} of {os.cpu_count()} processors")
    print(f"{'L2 cache':14}{l2_bytes() // 1024} KiB a core")
    print(f"{'CUDA':14}{torch.version.cuda or 'not in this torch'}")
    mps = torch.backends.mps
    state = "available" if mps.is_available() else "not available here"
    print(f"{'MPS':14}{state if mps.is_built() else 'not in this torch'}")
    for device in devices():
        _show_choices(device)
