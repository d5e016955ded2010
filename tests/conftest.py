"""No network, one thread, and random numbers that depend on the names of test and file alone."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the Hugging Face libraries read it when imported

import random
import re
import sys
import zlib
from typing import Any

import pytest
import torch

import tests.metal_ops.triton.interpreter  # noqa: F401 - before anything else imports Triton
from metal_ops.selftest import numerics

torch.set_num_threads(1)  # the tensors are small, and xdist starts a process per core


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    # nor on the package whose test it is
    name = re.sub("^tests/(hf_distill|metal_ops)/", "tests/", request.node.nodeid)
    value = zlib.crc32(name.encode())
    random.seed(value)
    torch.manual_seed(value)


def _set_aside() -> None:
    """Collections to come pass over everything that is there now.

    The Trainer collects before each run. Over the imported libraries and ten thousand collected
    tests that takes three times as long as the run of a tiny model itself.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _set_aside()


@pytest.fixture(autouse=True, scope="module")
def libraries() -> None:
    """Those that the tests of the module before have imported when they needed them."""
    _set_aside()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # an xdist worker hands its count to the process that reports
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["comparisons"] = numerics.comparisons


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    numerics.comparisons += getattr(node, "workeroutput", {}).get("comparisons", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if numerics.comparisons:
        terminalreporter.write_line(f"numerics: {numerics.comparisons} comparisons with float64")


def pytest_unconfigure() -> None:
    # At exit Triton's binding lists what it did not free, thirty lines behind pytest's last.
    if "triton" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
