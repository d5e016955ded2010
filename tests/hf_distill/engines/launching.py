"""Starts processes of an engine, each a fresh interpreter that finds the others by a port."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[3]


def started(words: list[str], outputs: list[IO[str]]) -> list[subprocess.Popen]:
    """Start as many processes of a module as there are outputs.

    Args:
        words: the module and its arguments.
        outputs: files for what each of them prints.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(len(outputs))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    for rank, output in enumerate(outputs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(outputs) > 1 else {}
        command = [sys.executable, "-m", *words]
        given = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT}
        found.append(subprocess.Popen(command, env=env | ranks, **given))
    return found
