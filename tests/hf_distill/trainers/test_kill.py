"""Runs that are killed with SIGKILL, and go on as if they had not been, bit for bit."""

import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import trainer_utils

from hf_distill.trainers import checkpoints
from tests.hf_distill.trainers import killing, models
from tests.hf_distill.trainers.killing import DONE, LOG, Stop
from tests.processes import context

ROOT = Path(__file__).parents[3]
STEPS = 5


def _child(folder: Path, setup: str, stop: Stop | None, sender: Connection) -> None:
    killing.run(folder, setup, STEPS, stop, sender.send)


@pytest.fixture(scope="module")
def processes() -> Any:
    return context()


def start(processes: Any, folder: Path, setup: str, stop: Stop | None = None) -> None:
    """Run in a process of its own to the end, or to a place where it is killed."""
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_child, args=(folder, setup, stop, sender))
    process.start()
    sender.close()
    end = DONE if stop is None else stop.place
    said = ""
    while said != end:
        assert receiver.poll(60), f"the run said {said!r} and then nothing"
        said = receiver.recv()
    if stop is not None:
        process.kill()
    process.join(60)
    assert process.exitcode == (0 if stop is None else -9)


def assert_bit_equal(one: Path, other: Path) -> None:
    (weights, logs), (others, other_logs) = (torch.load(x / "result.pt") for x in (one, other))
    assert models.difference(weights, others) == 0.0
    assert logs == other_logs
    assert all(log["soft"] > 0 for log in logs)


CHAINS = {
    "lora": [Stop(3, "loss"), Stop(4, "teacher"), Stop(4, "mark")],
    "full": [Stop(3, "weights"), Stop(3, "rollout"), Stop(3, "loss")],  # and on inside a rollout
}


def test_killed_runs_go_on_bit_for_bit(tmp_path: Path, processes: Any) -> None:
    """In the middle of a step, and in the middle of a file of a checkpoint."""
    for setup, stops in CHAINS.items():  # one test: the imports take longer than the runs
        straight, killed = tmp_path / f"{setup}-straight", tmp_path / f"{setup}-killed"
        start(processes, straight, setup)
        for stop in stops:
            start(processes, killed, setup, stop)
            if stop.place != "loss":
                torn = str(killed / f"checkpoint-{stop.step}")
                assert trainer_utils.get_last_checkpoint(killed) == torn  # the Trainer's choice
                assert checkpoints.find_flaw(torn) is not None
        start(processes, killed, setup)
        assert_bit_equal(straight, killed)
        assert (killed / LOG).read_text().count("is passed over: it") == len(stops) - 1


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["lora", "full"])
def test_a_run_killed_at_ten_random_moments_goes_on_bit_for_bit(tmp_path: Path, setup: str) -> None:
    """A script of its own each time; it is killed some time after its first checkpoint."""
    steps, moments = 60, random.Random(7)
    folders = straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-m", "tests.hf_distill.trainers.killing"]
    delays = [moments.uniform(0, 0.5) for _ in range(10)]
    for folder, waits in zip(folders, ([], delays), strict=True):
        for wait in [*waits, None]:
            arguments = [str(folder), setup, str(steps)]
            with subprocess.Popen(
                [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if wait is not None and line.startswith("saved"):
                        time.sleep(wait)
                        process.kill()
                        break
            assert process.returncode == (0 if wait is None else -9)
    assert_bit_equal(straight, killed)
