"""Keeps compiled graphs: each is compiled once, at its first use, within a limit of time.

A graph is the compiled form of one function for one `Key`. It is compiled in a thread of its own,
on inputs made for the purpose, so that the caller's tensors are untouched where that fails. torch
keeps what Inductor made on disk (TORCHINDUCTOR_CACHE_DIR): the next process only loads it.
"""

import logging
import threading
import time
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metal_ops.backends.errors import KernelError

FEW_COLUMNS = 4096
TIMEOUT_S = 300.0  # for one graph; a compiler needs some 5 s on an idle core

Function = Callable[..., Any]
logger = logging.getLogger("metal_ops")


class Key(NamedTuple):
    """Names a graph: a function of `rows`, its constants, and what of tensors it depends on."""

    function: str
    constants: object
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    many: bool  # columns: Inductor sums them in parts
    threads: int  # of a CPU: they are written into the code

    @staticmethod
    def of(function: str, constants: object, tensors: tuple[Tensor, ...]) -> "Key":
        """Name the graph for tensors [n, V]."""
        device, many = tensors[0].device, tensors[0].shape[1] > FEW_COLUMNS
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        dtypes = tuple(x.dtype for x in tensors)
        return Key(function, constants, dtypes, device, many, threads)

    def __str__(self) -> str:
        dtypes = " ".join(str(x).removeprefix("torch.") for x in self.dtypes)
        columns = f"{'over' if self.many else 'up to'} {FEW_COLUMNS} columns"
        return f"compiled {self.function} {self.constants}: {columns}, {dtypes}, {self.device.type}"


_graphs: dict[Key, Function] = {}
_failed: dict[Key, KernelError] = {}
_lock = threading.Lock()


def _own_code(function: Function) -> Function:
    """Copy a function with its code: torch.compile counts graphs by code, and gives up at eight."""
    code = function.__code__.replace(co_name=function.__name__)
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _compile(key: Key, function: Function) -> Function:
    options: dict[str, Any] = {}
    if key.device.type == "cpu":
        options["cpp.threads"] = key.threads
    return torch.compile(_own_code(function), fullgraph=True, options=options)


def run(function: Function, args: tuple[Tensor, ...]) -> Any:
    """Call a compiled function in a state that is the same at all times: graphs depend on it."""
    device = args[0].device.type
    # as below an operator of torch, where most calls come from
    below = torch._C._AutoDispatchBelowAutograd()
    with below, torch.no_grad(), torch.autocast(device, enabled=False):
        return function(*args)


def _first_run(key: Key, function: Function, args: tuple[Tensor, ...]) -> Function:
    """Compile by a call on `args`.

    Raises:
        KernelError: the compiler failed, or took longer than the limit.
    """
    graph, problems = _compile(key, function), []

    def work() -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, about torch
                run(graph, args)
        except Exception as error:  # of Dynamo, Inductor, a C++ compiler, a driver
            problems.append(error)

    start = time.monotonic()
    logger.info("%s: compiling, at its first use", key)
    thread = threading.Thread(target=work, name=str(key), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        raise KernelError(str(key), f"not compiled within {TIMEOUT_S:g} s")
    if problems:
        error = problems[0]
        raise KernelError(str(key), f"{type(error).__name__}: {error}") from error
    logger.info("%s: ready after %.1f s", key, time.monotonic() - start)
    return graph


def graph(
    key: Key, make: Callable[[], Function], example: Callable[[], tuple[Tensor, ...]]
) -> Function:
    """Return the graph of a key.

    Args:
        key: names it.
        make: returns the function to compile.
        example: returns arguments to compile it with, which may be written to.

    Raises:
        KernelError: it cannot be compiled; said again at every call.
    """
    with _lock:
        if key in _failed:
            raise _failed[key]
        if key not in _graphs:
            try:
                _graphs[key] = _first_run(key, make(), example())
            except KernelError as error:
                _failed[key] = error
                raise
        return _graphs[key]
