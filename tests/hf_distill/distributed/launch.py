"""Two processes of a test module, without a launcher; they meet in a file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]


def run_two(module: str, folder: Path) -> list[Any]:
    """What `python -m module FOLDER RANK` of ranks 0 and 1 wrote as FOLDER/RANK.pt."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder)]
    processes = []
    for rank in range(2):
        with open(folder / f"{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank)], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            )
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"{r}.log").read_text()[-4000:] for r in range(2))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
