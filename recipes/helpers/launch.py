"""Makes `accelerate launch --cpu --num_processes N` start N processes."""

import logging
import os
import sys
from collections.abc import Sequence

import psutil

logger = logging.getLogger("launch")

# what torchrun and the MPI launchers set in a process that is one of several
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def asked_processes(command: Sequence[str]) -> int:
    """Return the value of --num_processes in a launcher's command line; 1 if it is not there."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            return int(value or following)
    return 1


def start_missing_processes() -> None:
    """Restart this script under torchrun if the launcher started one process of several.

    On a CPU accelerate leaves the other processes to MPI, and starts a single one without a word
    where no host file is given. It does set MASTER_ADDR, which tells this case from one process
    that is meant to be alone. The launcher's command line says how many were asked for. Returns
    if there is nothing to do; otherwise this process becomes torchrun.
    """
    env = os.environ
    if env.get("ACCELERATE_USE_CPU") != "True" or "MASTER_ADDR" not in env:
        return
    if any(name in env for name in RANK_VARIABLES):
        return
    processes = asked_processes(psutil.Process(os.getppid()).cmdline())
    if processes < 2:
        return
    logger.warning(
        "accelerate starts one CPU process unless MPI is set up: starting %d with torchrun",
        processes,
    )
    command = [sys.executable, "-m", "torch.distributed.run"]
    place = ["--master_addr", env["MASTER_ADDR"], "--master_port", env["MASTER_PORT"]]
    os.execv(sys.executable, [*command, "--nproc_per_node", str(processes), *place, *sys.argv])
