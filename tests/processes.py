"""Processes of tests, forked from one that has the libraries imported: that takes seconds."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed


def context() -> ForkServerContext:
    """Starts processes; all tests of a worker share the server that forks them."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["hf_distill", "tests.hf_distill.trainers.models"])
    return made


def join(meeting: Path, rank: int, count: int = 2) -> None:
    """Be one of some processes, which meet in a file."""
    names, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict.fromkeys(names, str(rank)) | dict.fromkeys(sizes, str(count))
    given = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=120)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count, **given)


def _rank(
    rank: int, count: int, folder: Path, target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    join(folder / "meeting", rank, count)
    target(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(count: int, folder: Path, target: Callable[..., Any], *arguments: Any) -> str:
    """Call a function as ranks 0 to `count` - 1 of a process group.

    Args:
        count: of processes.
        folder: is made; for the processes' output and their meeting.
        target: a function at the top of a module.
        *arguments: of the function.

    Returns:
        What all printed, one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = [(rank, count, folder, target, arguments) for rank in range(count)]
    started = [context().Process(target=_rank, args=x) for x in given]
    for process in started:
        process.start()
    for process in started:
        process.join(180)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    logs = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(count)]
    assert codes == [0] * count, "\n".join(log[-6000:] for log in logs)
    return "".join(logs)


run_two = partial(run, 2)


def main_of(module: str, *argv: object) -> None:
    """Run a module's `main()` as if the words had come from a command line."""
    sys.argv = [module, *map(str, argv)]
    importlib.import_module(module).main()
