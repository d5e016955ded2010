"""`accelerate launch --cpu --num_processes 2` starts two processes of a recipe."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import launch

RECIPES = Path(launch.__file__).parents[1]

SCRIPT = """
import sys
sys.path.insert(0, {recipes!r})
from helpers.launch import start_missing_processes
start_missing_processes()
import os
from pathlib import Path
rank = os.environ.get("RANK", "alone")
Path(__file__).with_name(f"process_{{rank}}").write_text(" ".join(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("accelerate launch --cpu --num_processes 3 x.py", 3),
        ("accelerate launch --num-processes=2 x.py", 2),
        ("accelerate launch --cpu x.py", 1),
    ],
)
def test_asked_processes(command: str, expected: int):
    assert launch.asked_processes(command.split()) == expected


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_process_starts(tmp_path: Path, processes: int):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(recipes=str(RECIPES)))
    command = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes"]
    subprocess.run(
        [*command, str(processes), "--main_process_port", "29517", script, "--steps", "4"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    # a file each: what several processes print to one pipe may be mixed within a line
    started = {path.name: path.read_text() for path in tmp_path.glob("process_*")}
    ranks = range(2) if processes == 2 else ["alone"]
    assert started == {f"process_{rank}": "--steps 4" for rank in ranks}
