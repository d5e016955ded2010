"""Which rows of heads in pieces a loss is given, in which dtype, and what the log says of it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_distill.losses import DivergenceLoss, Tokens, divergence, split_heads
from hf_distill.models.signals import Signal
from metal_ops import DivergenceSpec, Head

FULL, FEW = DivergenceSpec("jsd"), DivergenceSpec("jsd", support="union", top_k=2)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """The first of two processes; the other is made up."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    split_heads._say.cache_clear()
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def signal(mesh: Any, rows: int, **changes: Any) -> Signal:
    weight = distribute_tensor(torch.randn(rows, 3), mesh, [Shard(0)]).requires_grad_()
    hidden = torch.randn(4, 3, dtype=changes.pop("dtype", torch.float32))
    return Signal(None, hidden, Head(weight), **changes)


@pytest.mark.parametrize(
    ("spec", "rows", "said"),
    [
        (FULL, 6, "in pieces; sums over the vocabulary are exchanged"),
        (FEW, 6, "joined, for the divergence over the entries of 'union'"),
        (FULL, 8, "joined, since student and teacher are cut at other entries"),
    ],
)
def test_what_is_given_is_what_is_said(
    spec: DivergenceSpec, rows: int, said: str, mesh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="hf_distill")
    student, teacher = signal(mesh, 6), signal(mesh, rows)
    for _ in range(2):
        heads = split_heads.split_heads(student, teacher, spec)
    assert [x.getMessage().split(": ")[1] for x in caplog.records] == [said]  # once
    if not said.startswith("in pieces"):
        assert (heads.student, heads.teacher) == (student.head, teacher.head)
        assert heads.options == {}
        return
    assert (heads.student.weight.shape, heads.teacher.weight.shape) == ((3, 3), (3, 3))
    assert heads.options == {"group": mesh.get_group(), "own_tokens": False}


def test_rows_of_data_parallelism(mesh: Any) -> None:
    """They are in the dtype of the hidden states, and their gradients are averaged."""
    student = signal(mesh, 6, own_tokens=True, dtype=torch.bfloat16)
    heads = split_heads.split_heads(student, signal(mesh, 6, own_tokens=True), FULL)
    assert heads.options["own_tokens"]
    assert heads.student.weight.dtype == torch.bfloat16
    assert heads.teacher.weight.dtype == torch.float32
    heads.student.weight.sum().backward()
    assert student.head is not None
    assert student.head.weight.grad is not None
    local: Any = student.head.weight.grad
    assert torch.equal(local.to_local(), torch.full((3, 3), 0.5))
    shared = split_heads.split_heads(student, student, FULL)
    assert shared.student is shared.teacher


def test_hard_labels_of_other_weights_join_no_head(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cross-entropy that is computed apart is of rows of the head too."""
    kinds: list[type] = []
    fused = divergence.linear_divergence
    monkeypatch.setattr(Head, "gathered", lambda _: pytest.fail("a head was joined"))

    def count(*sides: Any, **options: Any) -> Any:
        kinds.extend(type(side.weight) for side in sides if isinstance(side, Head))
        return fused(*sides, **options)

    monkeypatch.setattr(divergence, "linear_divergence", count)
    weights = torch.full((4,), 0.25)
    tokens = Tokens(torch.tensor([0, 1, 4, 5]), weights, corrected=weights * torch.arange(4))
    terms = DivergenceLoss(FULL, 0.5)(signal(mesh, 6), signal(mesh, 6), tokens)
    assert terms.metrics.keys() >= {"soft", "hard"}
    assert len(kinds) == 4
    assert DTensor not in kinds
