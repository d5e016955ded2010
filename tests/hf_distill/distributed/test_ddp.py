"""Two processes give the weights of one process with twice the rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hf_distill.distributed import setups
from tests.hf_distill.trainers import models, own_losses

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings(models.PEFT_WARNING),
]

TOLERANCE = 2e-6  # measured: at most 1.2e-7; the mean over each process gives 3.6e-3
SAME = ("soft_", "share_", "completion", "hint", "max_hint")  # metrics, where they are logged
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every set-up, run by two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    # with --cpu it would start one process; the set-ups ask for the CPU themselves
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [
        sys.executable,
        *launch,
        *port,
        "-m",
        "tests.hf_distill.distributed.setups",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


@pytest.mark.parametrize(
    "setup",
    [s for s in setups.SETUPS if s not in (setups.distill_local_mean, setups.stopped_by_one)],
    ids=lambda s: s.__name__,
)
def test_two_processes_are_one(two_processes: Path, tmp_path: Path, setup) -> None:
    weights, logs = torch.load(two_processes / f"{setup.__name__}.pt")
    expected, expected_logs = setups.train(setup, tmp_path, 1)
    number = "rows" if setup is setups.classify else "tokens"
    assert [step[number] for step in logs] == [step[number] for step in expected_logs]
    for step, want in zip(logs, expected_logs, strict=True):
        assert step["soft"] == pytest.approx(want["soft"], rel=1e-4)  # weights differ after step 1
        means = {"anchor", "advantage", "hard", "taid_t", "taid_teacher_kl", "entropy_factor"}
        means |= {"target_id", "teacher_right", "above_30", "width", "aux", "expert_agreement"}
        for name in (means | {"reasoning_share"}) & want.keys():
            assert step[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5)
        split = {name for name in want if name.startswith(SAME)}
        assert {name: step[name] for name in split} == pytest.approx(
            {name: want[name] for name in split}, rel=1e-3
        )
    assert models.difference(weights, expected) <= TOLERANCE


def test_an_own_loss_of_two_processes_is_the_built_in_one(two_processes: Path) -> None:
    built_in, logs = torch.load(two_processes / "distill.pt")
    own, own_logs = torch.load(two_processes / "distill_own_loss.pt")
    # as in one process, see tests/hf_distill/trainers/test_own_loss.py
    assert models.difference(own, built_in) <= 10 * TOLERANCE
    for log, want in zip(own_logs, logs, strict=True):
        assert not own_losses.MEASURED & log.keys()
        shared = ("loss", "soft", "hard", "tokens")
        assert {x: log[x] for x in shared} == pytest.approx({x: want[x] for x in shared}, rel=1e-5)


def test_the_table_of_completions_has_the_rows_of_both(two_processes: Path, tmp_path: Path) -> None:
    setups.train(setups.opsd_on_policy, tmp_path, 1)
    found, expected = (
        sorted((folder / "completions.jsonl").read_text().splitlines())
        for folder in (two_processes, tmp_path)
    )
    assert found == expected
    assert len(found) == 3 * setups.ROWS_PER_STEP


def test_a_fault_on_one_process_stops_all(two_processes: Path) -> None:
    """Else the other would wait for it until the launcher's time is over."""
    _, logs = torch.load(two_processes / "stopped_by_one.pt")
    assert [step["step"] for step in logs] == [1]
    assert logs[0]["watchdog_teacher_follows"] > 1


def test_a_mean_over_each_process_would_show(two_processes: Path) -> None:
    right, _ = torch.load(two_processes / "distill.pt")
    wrong, _ = torch.load(two_processes / "distill_local_mean.pt")
    assert models.difference(right, wrong) > 100 * TOLERANCE


def test_two_processes_resume_bit_for_bit(two_processes: Path) -> None:
    """Each with its own samples, in the middle of a rollout."""
    saved = two_processes / "saved" / f"checkpoint-{setups.SAVED_AT}"
    one, other = ((saved / f"rollout-{rank}.json").read_text() for rank in range(2))
    assert one != other
    weights, logs = torch.load(two_processes / "straight.pt")
    again, again_logs = torch.load(two_processes / "resumed.pt")
    assert models.difference(weights, again) == 0.0
    assert len(logs) == setups.SAVED_AT + 2
    for step in (*logs, *again_logs):  # measured from where a process starts or resumes
        step.pop("ema_moved", None)
        step.pop("ema_distance", None)
    assert logs == again_logs
