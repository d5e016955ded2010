"""One of three processes is killed with SIGKILL: the launch ends, and another goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_distill.trainers.checkpoints import find_flaw
from tests.hf_distill.engines.killed import KINDS, Stop
from tests.hf_distill.engines.launching import ROOT
from tests.hf_distill.trainers import models

STOPS = [
    Stop(1, 2, "loss"),  # in the middle of a step, and of a rollout that is used for two
    Stop(2, 4, "extra"),  # in the middle of a checkpoint, of which others have written theirs
    Stop(0, 5, "mark"),  # in the middle of its last file
]


def launch(engine: str, folder: Path, stop: Stop | None = None) -> str:
    """Run to the end, or until a process is killed; what was said."""
    folder.mkdir(exist_ok=True)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = [engine, str(folder), *map(str, stop or ())]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.hf_distill.engines.killed", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # the launcher ends the processes that wait for the one that was killed
        check=False,
    )
    assert (done.returncode == 0) == (stop is None), done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", KINDS)
def test_a_launch_goes_on_from_where_one_process_was_killed(tmp_path: Path, engine: str) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    launch(engine, straight)
    for stop in STOPS:
        said = launch(engine, killed, stop)
        assert "Signal 9 (SIGKILL) received by PID" in said
        assert f"local_rank: {stop.rank}" in said
        assert not (killed / "result.pt").exists()
        if stop.place != "loss":
            assert find_flaw(str(killed / f"checkpoint-{stop.step}")) is not None
    said = launch(engine, killed)
    assert "checkpoint-5 is passed over" in said
    (weights, logs), (others, other_logs) = (
        torch.load(x / "result.pt", weights_only=False) for x in (straight, killed)
    )
    assert models.difference(weights, others) == 0.0
    assert logs == other_logs
    assert len(logs) == 6
