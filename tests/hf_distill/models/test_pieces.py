"""Names and memory of parameters in pieces.

Engines cut and join them in `tests/hf_distill/engines`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_distill.models import pieces
from hf_distill.models.structure import Kind
from hf_distill.trainers import checks


def test_names_without_wrappers() -> None:
    name = "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.weight"
    assert pieces.plain_name(name) == "model.layers.0.mlp.weight"
    assert pieces.plain_name("_orig_mod.layer.weight") == "layer.weight"  # compiled


def test_a_whole_parameter_is_its_own_piece() -> None:
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert pieces.piece(parameter).data_ptr() == parameter.data_ptr()
    assert pieces.whole_shape(parameter) == (2, 3)
    made = pieces.cut(torch.ones(2, 3), parameter, flat=False)
    assert torch.equal(pieces.join(made, parameter, parameter.shape, flat=False), torch.ones(2, 3))
    assert not pieces.lies_in_pieces(nn.Linear(2, 2))


def test_a_parameter_of_zero_3_has_its_piece_beside_it() -> None:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_shape = torch.arange(3.0), torch.Size((5, 1))  # pyright: ignore
    assert pieces.piece(parameter).data_ptr() == parameter.ds_tensor.data_ptr()  # pyright: ignore
    assert pieces.whole_shape(parameter) == (5, 1)
    model = nn.Linear(2, 2)
    assert not pieces.lies_flat(model)
    model.weight = parameter
    assert pieces.lies_flat(model)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One of three processes; the others are made up."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


def tied(rows: int, mesh: Any, apart: bool, trained: bool = True) -> nn.Module:
    """Embeddings and a head of the same weights, joined apart or by the whole model's call."""
    parts = {"embeddings": nn.Embedding(rows, 2), "head": nn.Linear(2, rows, False)}
    model = nn.Sequential(OrderedDict(parts))
    model.requires_grad_(trained)
    if apart:
        fully_shard(model.embeddings, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.head.weight = model.embeddings.weight
    return model


def test_tied_weights_that_fsdp_2_holds_twice(mesh: Any) -> None:
    assert pieces.unevenly_held_twice(tied(7, mesh, apart=True)) == "head.weight"
    assert pieces.unevenly_held_twice(tied(9, mesh, apart=True)) is None  # one memory
    assert pieces.unevenly_held_twice(tied(7, mesh, apart=False)) is None
    assert pieces.unevenly_held_twice(tied(7, mesh, apart=True, trained=False)) is None
    run: Any = SimpleNamespace(student=tied(7, mesh, apart=True))
    run.accelerator = SimpleNamespace(num_processes=3)
    with pytest.raises(ValueError, match=r"got head.weight of 7 rows on 3 processes: take a num"):
        checks._check_tied(run)


class Attention(nn.Module):
    """Heads of 4 numbers, under tensor parallelism."""

    def __init__(self, heads: int, mesh: Any, name: str = "k_proj", adapted: bool = False) -> None:
        super().__init__()
        self.head_dim, self._tp_size = 4, 3
        projection = nn.Linear(2, 4 * heads, bias=False)
        cut = distribute_tensor(projection.weight.data, mesh, [Shard(0)])
        projection.weight = nn.Parameter(cut)
        if adapted:
            projection = LoraLinear(projection, "default", LoraConfig(), r=1)
        self.register_module(name, projection)


def test_heads_that_processes_would_share(mesh: Any) -> None:
    assert pieces.cut_heads(nn.ModuleDict({"one": Attention(6, mesh)})) is None
    assert pieces.cut_heads(nn.ModuleDict({"one": Attention(4, mesh)})) == "one.k_proj"
    checks._check_heads("teacher", Attention(6, mesh))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert pieces.cut_heads(nn.ModuleDict({"one": Attention(4, mesh, name)})) == f"one.{name}"
    adapted = nn.ModuleDict({"one": Attention(4, mesh, adapted=True)})
    assert pieces.cut_heads(adapted) == "one.k_proj"
    checks._check_heads("teacher", None)
    with pytest.raises(ValueError, match=r"heads of the teacher must be .* got tp_size 3 and "):
        checks._check_heads("teacher", Attention(4, mesh))


def run_of(student: nn.Module, teacher: nn.Module | None = None) -> Any:
    """Enough of a run on three processes for the checks that come first."""
    args = {"n_gpu": 1, "use_cpu": False, "fsdp": None, "deepspeed": None}
    kind = {"distributed_type": DistributedType.MULTI_CPU, "is_fsdp2": False}
    return SimpleNamespace(
        args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(num_processes=3, **kind),
        student=student,
        teachers=[] if teacher is None else [SimpleNamespace(model=teacher)],
        num_copies=3,
        num_parts=1,
        kind=Kind.ROWS,
    )


def test_what_lies_in_pieces_is_checked_before_training(mesh: Any) -> None:
    with pytest.raises(ValueError, match=r"got head\.weight of 7 rows on 3 processes"):
        checks.check_setup(run_of(tied(7, mesh, apart=True)))
    with pytest.raises(ValueError, match="attention heads of the student must be divisible"):
        checks.check_setup(run_of(Attention(4, mesh)))
    with pytest.raises(ValueError, match="attention heads of the teacher must be divisible"):
        checks.check_setup(run_of(nn.Linear(2, 2), Attention(4, mesh)))
