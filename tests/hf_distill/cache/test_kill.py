"""Writers that are killed with SIGKILL: what goes on is, byte for byte, what was not stopped."""

import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf_distill.cache import CacheIncomplete, CacheReader
from hf_distill.cache.shard import sidecar_name
from tests import processes
from tests.hf_distill.cache import caches, writing
from tests.hf_distill.cache.writing import BEGUN, COUNT, DONE, RENAMED, SHARDS


class Process(NamedTuple):
    process: Any
    receiver: Connection

    def wait_for(self, said: str) -> None:
        assert self.receiver.poll(90), f"the writer did not say {said!r}"
        assert self.receiver.recv() == said

    def ended(self, code: int = 0) -> None:
        self.process.join(90)
        assert self.process.exitcode == code


def _child(
    folder: Path,
    rank: int | None,
    rename: int | None,
    tells: bool,
    world: int,
    sender: Connection,
) -> None:
    if tells:
        writing.tell_renames(sender.send)
    if rename is not None:
        writing.die_at_rename(rename)
    writing.write(folder, rank, sender.send, world)


@pytest.fixture(scope="module")
def context() -> Any:
    return processes.context()


def start(
    context: Any,
    folder: Path,
    rank: int | None = None,
    rename: int | None = None,
    tells: bool = False,
    world: int = 2,
) -> Process:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folder, rank, rename, tells, world, sender))
    process.start()
    sender.close()
    return Process(process, receiver)


def finish(context: Any, folder: Path, world: int) -> None:
    """Go on to the end, in one process or several."""
    folder.with_name(folder.name + ".meeting").unlink(missing_ok=True)
    ranks: Sequence[int | None] = [None] if world == 1 else range(world)
    processes = [start(context, folder, rank, world=world) for rank in ranks]
    for process in processes:
        process.wait_for(BEGUN)
        process.wait_for(DONE)
        process.ended()


def committed(folder: Path) -> dict[str, int]:
    """The shards that have a sidecar, and when they were written."""
    sidecars = folder.glob("shards/*.json")
    shards = [path.with_suffix(".safetensors") for path in sidecars]
    return {path.name: path.stat().st_mtime_ns for path in shards}


@pytest.fixture(scope="module")
def straight(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("straight") / "cache"
    finish(context, folder, 1)
    return folder


def assert_is_whole(folder: Path, straight: Path) -> None:
    """No row is lost or there twice, and every byte is that of the straight run."""
    assert caches.contents(folder) == caches.contents(straight)
    for name in ("config.json", "row_hashes.bin"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    found = CacheReader(folder, "full")
    assert [found.row(i).row for i in range(COUNT)] == list(range(COUNT))
    assert found.manifest.stats == CacheReader(straight).manifest.stats
    assert not list(folder.rglob("*.tmp"))


def kill_and_check(process: Process, folder: Path, before: dict[str, int]) -> dict[str, int]:
    """Kill a writer; what was committed is still there, and has not been written again."""
    process.process.kill()
    process.ended(-9)
    return check_kept(folder, before)


def check_kept(folder: Path, before: dict[str, int]) -> dict[str, int]:
    after = committed(folder)
    assert before.items() <= after.items()
    with pytest.raises(CacheIncomplete, match=r"there is no manifest.json"):
        CacheReader(folder)
    return after


def rename_of(shard: int, sidecar: bool) -> int:
    """See `writing.die_at_rename`, for a first run."""
    return 1 + 2 * shard + sidecar


def test_killed_between_two_files(tmp_path: Path, context: Any, straight: Path) -> None:
    """Before a shard, a sidecar, the hashes and the manifest get their names."""
    folder = tmp_path / "cache"
    places = [  # the rename that does not happen, and the shards that are then there
        (rename_of(2, sidecar=False), 2),
        (1, 2),  # this run begins with shard 2
        (4, 4),
        (2 * (SHARDS - 4), SHARDS),
        (1, SHARDS),
    ]
    kept: dict[str, int] = {}
    for rename, shards in places:
        start(context, folder, rename=rename).ended(-9)
        kept = check_kept(folder, kept)
        assert len(kept) == shards
        assert list(folder.rglob("*.tmp"))
    finish(context, folder, 1)
    assert_is_whole(folder, straight)


def kill_at_random(context: Any, folder: Path, kills: int, chance: random.Random) -> int:
    """Kill a writer again and again, some time after it has renamed a few files.

    Counted from a rename, and not from the start, the moments are spread over the writing on a slow
    machine too. Returns the number of shards that are there.
    """
    kept: dict[str, int] = {}
    for _ in range(kills):
        process = start(context, folder, tells=True)
        process.wait_for(BEGUN)
        for _ in range(chance.randrange(5)):
            process.wait_for(RENAMED)
        time.sleep(chance.uniform(0, 0.01))
        kept = kill_and_check(process, folder, kept)
    return len(kept)


def test_killed_three_times_and_resumed(tmp_path: Path, context: Any, straight: Path) -> None:
    folder = tmp_path / "cache"
    assert 0 < kill_at_random(context, folder, 3, random.Random(3)) < SHARDS
    finish(context, folder, 1)
    assert_is_whole(folder, straight)


@pytest.mark.distributed
def test_two_processes_go_on_from_one_and_one_from_two(
    tmp_path: Path, context: Any, straight: Path
) -> None:
    folder = tmp_path / "cache"
    start(context, folder, rename=rename_of(5, sidecar=True)).ended(-9)
    finish(context, folder, 2)
    assert_is_whole(folder, straight)
    ranks = {path.name: b'"rank": 1' in path.read_bytes() for path in folder.glob("shards/*.json")}
    assert sum(ranks.values()) == (SHARDS - 5) // 2
    for number in (1, 2, 7):
        (folder / sidecar_name(number)).unlink()
    finish(context, folder, 1)
    assert_is_whole(folder, straight)


@pytest.mark.distributed
def test_one_of_three_processes_is_killed(tmp_path: Path, context: Any, straight: Path) -> None:
    """The launcher then ends the others, which would wait; three others go on."""
    folder = tmp_path / "cache"
    dies = {1: 4}  # at the third shard of process 1: it renames two files for each
    running = [start(context, folder, rank, dies.get(rank), world=3) for rank in range(3)]
    running[1].ended(-9)
    kept = check_kept(folder, {})
    for one in (running[0], running[2]):
        one.process.kill()
        one.ended(-9)
    assert 0 < len(check_kept(folder, kept)) < SHARDS
    finish(context, folder, 3)
    assert_is_whole(folder, straight)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_twenty_random_moments(
    tmp_path: Path, context: Any, straight: Path, world: int
) -> None:
    folder = tmp_path / "cache"
    assert 10 < kill_at_random(context, folder, 20, random.Random(world)) < SHARDS
    finish(context, folder, world)
    assert_is_whole(folder, straight)
