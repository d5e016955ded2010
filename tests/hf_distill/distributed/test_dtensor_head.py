"""A head cut over two processes gives the loss and the gradients of a whole one."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from metal_ops import DivergenceSpec, Head, linear_divergence
from metal_ops.functional import head
from tests.processes import run_two

pytestmark = pytest.mark.distributed

SPEC = DivergenceSpec("jsd", 0.3, 2.0, support="union", top_k=5)
VOCAB = 33  # 17 rows on the first process, 16 on the second
CASES = ("plain", "bias", "shared", "sharded teacher", "frozen", "other tokens", "2 d")
Result = dict[str, Tensor]


def make(case: str, rank: int) -> dict[str, Tensor | None]:
    """Arguments of one process. Only with "other tokens" do they depend on the rank."""
    generator = torch.Generator().manual_seed(CASES.index(case))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head, teacher_head, bias = randn(VOCAB, 6), randn(VOCAB, 8), randn(VOCAB)
    hidden, teacher_hidden = randn(2, 5, 6), randn(2, 5, 6 if case == "shared" else 8)
    weights = torch.tensor([[1.0, 0.0, 0.5, 2.0, 0.25], [0.0, 3.0, 1.0, 0.0, 0.5]])
    mine = rank if case == "other tokens" else 0
    return {
        "student_hidden": hidden[mine].requires_grad_(),
        "student_weight": head.requires_grad_(case != "frozen"),
        "teacher_hidden": teacher_hidden[mine],
        "teacher_weight": teacher_head,
        "weights": weights[mine],
        "student_bias": bias.requires_grad_() if case == "bias" else None,
        "labels": torch.arange(5) + mine,
    }


def cut(case: str, arguments: dict[str, Tensor | None]) -> None:
    """Heads become pieces of a head over all processes."""
    shape, names = ((2, 1), ("dp", "tp")) if case == "2 d" else ((2,), ("dp",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    kept = ["student_weight"]
    kept += {"bias": ["student_bias"], "sharded teacher": ["teacher_weight"]}.get(case, [])
    for name in kept:
        whole = arguments[name]
        assert whole is not None
        piece = distribute_tensor(whole.detach(), mesh, [Shard(0)] * len(shape))
        arguments[name] = piece.requires_grad_(whole.requires_grad)


def compute(case: str, arguments: dict[str, Tensor | None]) -> Result:
    """Loss and gradients, whole on every process."""
    if case == "shared":
        arguments = arguments | {"teacher_weight": arguments["student_weight"]}
    given = dict(arguments)
    student = Head(given.pop("student_weight"), given.pop("student_bias"))  # pyright: ignore
    teacher = Head(given.pop("teacher_weight"))  # pyright: ignore
    given |= {"student_head": student, "teacher_head": teacher}
    loss = linear_divergence(**given, spec=SPEC, alpha=0.5).loss  # pyright: ignore
    (2 * loss).backward()
    out = {"loss": loss.detach()}
    for name, x in arguments.items():
        if x is not None and x.grad is not None:
            if isinstance(x, DTensor):
                assert isinstance(x.grad, DTensor)
                assert x.grad.placements == x.placements
                assert x.grad.to_local().shape == x.to_local().shape
            out[name] = x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
    return out


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """The results of each process; they meet in a file and write to files of their own."""
    folder = tmp_path_factory.mktemp("dtensor")
    run_two(folder, of_a_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(got: Result, want: Result) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in CASES if c != "other tokens"])
def test_a_sharded_head_is_the_whole_one(case, two_processes):
    """All processes hold the same tokens: the average of their gradients is that of each."""
    want = compute(case, make(case, 0))
    assert ("student_weight" in want) == (case != "frozen")
    assert ("student_bias" in want) == (case == "bias")
    for results in two_processes:
        same(results[case], want)


def test_gradients_of_other_tokens_are_averaged(two_processes):
    """As FSDP does: what belongs to a process is its own, what all hold is the mean."""
    case = "other tokens"
    alone = [compute(case, make(case, rank)) for rank in range(2)]
    mean = (alone[0]["student_weight"] + alone[1]["student_weight"]) / 2
    assert (alone[0]["loss"] - alone[1]["loss"]).abs() > 0.1
    for results, own in zip(two_processes, alone, strict=True):
        same(results[case], own | {"student_weight": mean})


def test_a_shared_head_is_gathered_once(two_processes):
    for results in two_processes:
        gathered = {case: int(number) for case, number in results["gathered"].items()}
        assert gathered == dict.fromkeys(CASES, 1) | {"bias": 2, "sharded teacher": 2}


def of_a_process(folder: Path) -> None:
    rank, results, gathered = torch.distributed.get_rank(), {}, {}
    for case in CASES:
        arguments = make(case, rank)
        cut(case, arguments)
        with mock.patch.object(head, "gather_shards", wraps=head.gather_shards) as gather:
            results[case] = compute(case, arguments)
        gathered[case] = torch.tensor(
            sum(isinstance(x.args[0], DTensor) for x in gather.mock_calls)
        )
    torch.save(results | {"gathered": gathered}, folder / f"{rank}.pt")
