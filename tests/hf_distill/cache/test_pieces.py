"""A cache of a teacher that lies in pieces on two processes: the bytes of a whole one's."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

from hf_distill.cache import CacheReader
from hf_distill.cache.processes import num_copies, part_of
from tests.hf_distill.cache import caches
from tests.hf_distill.trainers import models
from tests.processes import run_two

KINDS = {"fsdp": "fsdp_size", "tp": "tp_size"}
SHARD_ROWS = 4  # of 21 rows: the second process has a shard of one row, and asks less often
CPU = torch.device("cpu")
SHORT = 17  # rows: it has a shard less


def teacher(folder: Path, **config: int) -> Any:
    """A teacher whose vocabulary two processes share evenly."""
    given = {} if not config else {"distributed_config": DistributedConfig(**config)}
    kind = type(models.llama())
    return kind.from_pretrained(folder, dtype=torch.float32, **given)


def write(folder: Path, model: nn.Module, rows: int = caches.ROWS, **changes: Any) -> Any:
    data = models.problems(rows)
    return caches.write(folder, model, dataset=data, shard_rows=SHARD_ROWS, **changes)


def of_a_process(folder: Path) -> None:
    for kind, name in KINDS.items():
        model = teacher(folder / "teacher", **{name: dist.get_world_size()})
        write(folder / kind, model)
        write(folder / f"{kind} short", model, SHORT)
        write(folder / f"{kind} short", model, SHORT, batch_size=1)  # nothing is missing


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all caches, of pieces and of a whole teacher."""
    folder = tmp_path_factory.mktemp("pieces")
    models.llama(vocab_size=64).save_pretrained(folder / "teacher")
    run_two(folder, of_a_process, folder)
    write(folder / "whole", teacher(folder / "teacher"))
    write(folder / "whole short", teacher(folder / "teacher"), SHORT)
    return folder


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("length", ["", " short"])
def test_pieces_of_fsdp_say_the_bytes_of_the_whole(written: Path, length: str) -> None:
    made, whole = written / f"fsdp{length}", written / f"whole{length}"
    assert caches.contents(made) == caches.contents(whole)
    assert config(made) == config(whole)
    ranks = {b'"rank": 1' in path.read_bytes() for path in made.glob("shards/*.json")}
    assert ranks == {True, False}  # both have written


@pytest.mark.distributed
def test_tensor_parallelism_says_the_same_to_rounding(written: Path) -> None:
    made, whole = CacheReader(written / "tp", "full"), CacheReader(written / "whole")
    assert config(written / "tp") == config(written / "whole")
    for number in range(caches.ROWS):
        one, other = (x.row(number).arrays for x in (made, whole))
        for name in one:
            a, b = (torch.from_numpy(x[name].astype("f8")) for x in (one, other))
            assert a.allclose(b, atol=0.008), name  # a step of 16 bits, see `caches.EXACT`
    assert not [p for p in written.glob("tp/shards/*.json") if b'"rank": 1' in p.read_bytes()]


def test_what_a_process_does() -> None:
    def part(rank: int, copies: int = 1) -> Any:
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0)
        return part_of([1, 4, 5, 7], state, copies)

    assert [part(rank) for rank in range(3)] == [([1, 7], 0, True), ([4], 1, True), ([5], 1, True)]
    assert [part(rank, 3) for rank in range(2)] == [
        ([1, 4, 5, 7], 0, True),
        ([1, 4, 5, 7], 0, False),
    ]


def test_other_pieces_are_refused() -> None:
    model: Any = models.llama()
    assert num_copies(model, 2) == 1
    model._tp_size = 2
    assert num_copies(model, 2) == 2
    with pytest.raises(ValueError, match="got tp_size 2 of 4 processes"):
        num_copies(model, 4)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="must not be cut by DeepSpeed's ZeRO-3"):
        num_copies(model, 2)


@pytest.fixture
def _one_of_two() -> Iterator[None]:
    """One of two processes; the other is made up."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_of_two")
def test_wrappers_of_fsdp_are_refused() -> None:
    model: Any = models.llama()
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=CPU)
    with pytest.raises(ValueError, match="must not be wrapped by FSDP 1"):
        num_copies(model, 2)
    cut: Any = fully_shard(models.llama())
    assert num_copies(cut, 2) == 1
    cut._tp_size = 2
    with pytest.raises(ValueError, match="got tp_size 2 of 2 processes and FSDP"):
        num_copies(cut, 2)
