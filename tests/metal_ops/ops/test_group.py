"""Heads whose rows lie on two or three processes give the loss and gradients of whole heads.

The tests of `linear_divergence` run once more, on each of the processes, with a function in its
place that hands each process its rows, and puts what comes of them together.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from metal_ops import DivergenceSpec, Head, LinearTerms, linear_divergence
from metal_ops.backends.blocks import split
from metal_ops.functional import DivergenceStats, one_local
from tests.metal_ops.ops import test_grid as grid
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops.again import again
from tests.processes import run

pytestmark = pytest.mark.distributed

TESTS: tuple[Callable[..., None], ...] = (
    linear.test_equals_the_composition,
    linear.test_float64_to_twelve_digits,
    linear.test_uneven_chunks_match_the_composition,
    linear.test_the_teacher_receives_no_gradient,
    linear.test_no_tokens,
    linear.test_a_token_of_no_weight_is_silent,
    linear.test_an_infinite_divergence_without_a_share_is_silent,
    linear.test_clip_passes_through,
    linear.test_one_weight_under_two_scales_or_softcaps_is_two_heads,
)
MODES = ("same tokens", "own tokens")


def part(size: int) -> slice:
    """This process's rows, as torch.chunk gives them: the last processes may have none."""
    step = -(-size // dist.get_world_size())
    first = min(dist.get_rank() * step, size)
    return slice(first, min(first + step, size))


class Cut(torch.autograd.Function):
    """Cuts a tensor, the same on all processes, into a part for each; gradients are whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x[part(len(x))].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return joined(grad, ctx.shape)


class Total(torch.autograd.Function):
    """Adds all processes' losses; each has the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        total = loss.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad


def joined(x: Tensor, shape: Any) -> Tensor:
    whole = x.new_zeros(shape)
    whole[part(shape[0])] = x
    dist.all_reduce(whole)
    return whole


def rows(head: Head) -> Head:
    weight, bias = (None if x is None else Cut.apply(x) for x in (head.weight, head.bias))
    return Head(weight, bias, head.logit_scale, head.softcap)  # pyright: ignore


def in_parts(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    spec: DivergenceSpec,
    *,
    weights: Tensor,
    labels: Tensor | None = None,
    own_tokens: bool,
    **options: Any,
) -> LinearTerms:
    """Call `linear_divergence` on this process's rows; what it returns is whole."""
    options["group"] = dist.group.WORLD
    head = rows(student_head)
    other = head if teacher_head.same_as(student_head) else rows(teacher_head)
    if not own_tokens:
        given = {"weights": weights, "labels": labels} | options
        return linear_divergence(student, head, teacher, other, spec, **given)
    tokens = len(weights)
    own = part(tokens)
    given = {"weights": weights[own], "labels": None if labels is None else labels[own]} | options
    mine = Cut.apply(student), head, teacher[own], other, spec
    found = linear_divergence(*mine, **given, own_tokens=True)  # pyright: ignore
    soft, hard = (joined(x, [tokens]) for x in (found.soft, found.hard))
    stats = found.stats and DivergenceStats(*(joined(x, [tokens]) for x in found.stats))
    return LinearTerms(Total.apply(found.loss), soft, hard, stats)  # pyright: ignore


def cases(every: int) -> list[tuple[Callable[..., None], dict[str, Any]]]:
    marked = again(tests=TESTS, wide=True, every=every)
    marked += again(tests=(grid.test_linear,), every=7 * every)
    return [x.values for x in marked]  # pyright: ignore


def of_a_process(mode: str, every: int, folder: Path) -> None:
    """Run all tests; write what failed, and how many columns were here."""
    failed, own = [], mode == "own tokens"
    linear.linear_divergence = lambda *a, **k: in_parts(*a, own_tokens=own, **k)
    widths = []
    joins = split._whole_rows
    split._whole_rows = lambda *a: widths.append(a[1][0].shape[-1]) or joins(*a)
    given_cases = cases(every)
    for test, arguments in given_cases:
        torch.manual_seed(0)
        patch = pytest.MonkeyPatch()
        given = dict(arguments)
        if "monkeypatch" in test.__code__.co_varnames[: test.__code__.co_argcount]:
            given["monkeypatch"] = patch
        try:
            test(**given)
        except Exception:
            failed.append(f"{test.__name__} {arguments}: {traceback.format_exc()[-1500:]}")
        patch.undo()
    torch.save((failed, len(given_cases), widths), folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize(
    ("count", "mode", "every"),
    [
        (2, "same tokens", 2),
        (3, "own tokens", 5),
        *(
            pytest.param(count, mode, 1, marks=pytest.mark.slow)
            for count in (2, 3)
            for mode in MODES
        ),
    ],
)
def test_the_tests_of_whole_heads(count: int, mode: str, every: int, tmp_path: Path) -> None:
    run(count, tmp_path, of_a_process, mode, every, tmp_path)
    for rank in range(count):
        failed, number, widths = torch.load(tmp_path / f"{rank}.pt")
        assert not failed, f"{len(failed)} of {number}, the first is {failed[0]}"
        assert len(widths) > number  # chunks, and some tests have more
        assert len(set(widths)) > 1
        if count == 3 and rank == 2:
            assert min(widths) == 0  # a process without a row of the head


def errors(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
    x, said = torch.randn(3, 4), ""
    try:
        given = {"weights": torch.ones(3), "group": dist.group.WORLD}
        linear_divergence(x, Head(weight), x, Head(weight), DivergenceSpec("jsd"), **given)
    except ValueError as error:
        said = str(error)
    torch.save(said, folder / f"{dist.get_rank()}.pt")


def test_a_dtensor_is_not_a_process_s_own_rows(tmp_path: Path) -> None:
    run(2, tmp_path, errors, tmp_path)
    assert "heads must be a process's own rows, got a DTensor" in torch.load(tmp_path / "0.pt")


def own_rows(folder: Path) -> None:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    weight, bias = torch.randn(7, 4), torch.randn(7)
    dist.broadcast(weight, 0)
    dist.broadcast(bias, 0)
    cut = Head(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias)), 0.5, 3.0)
    whole = Head(weight, bias, 0.5, 3.0)
    assert whole.own_rows() is None
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    assert Head(replicated).own_rows() is None
    for size, rows in (
        (7, [slice(0, 4), slice(4, 7)]),
        (5, [slice(0, 4), slice(4, 5)]),
        (3, [slice(0, 3), slice(3, 3)]),
    ):
        for head in (cut.first(size), whole.first(size)):
            found = head.own_rows(cut)
            assert found is not None
            assert found.rows == rows[rank]
            assert found.group.size() == 2
            assert torch.equal(found.head.weight, weight[found.rows])
            assert torch.equal(found.head.bias, bias[found.rows])  # pyright: ignore
            assert found.head.vocab == len(found.head.weight)
            assert (found.head.logit_scale, found.head.softcap) == (0.5, 3.0)
        assert cut.first(size).vocab == size
        assert torch.equal(cut.first(size).gathered().weight, weight[:size])
        assert not cut.first(size).same_as(cut) or size == 7


def test_a_name_is_no_process_group() -> None:
    x, head, name = torch.randn(2, 3), Head(torch.randn(4, 3)), cast(Any, "world")
    with pytest.raises(TypeError, match=r"group must be a process group of .*, got 'world'"):
        linear_divergence(
            x, head, x, head, DivergenceSpec("forward_kl"), weights=torch.ones(2), group=name
        )


def test_a_process_s_rows_of_a_head(tmp_path: Path) -> None:
    run(2, tmp_path, own_rows, tmp_path)


def one_tensor_for_all(folder: Path) -> None:
    weight = nn.Parameter(
        distribute_tensor(torch.randn(6, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    )

    def rows() -> Tensor:
        found = Head(weight).own_rows()
        assert found is not None
        return found.head.weight

    assert rows() is not rows()
    with one_local(weight):
        first, again = rows(), rows()
        with one_local(weight):
            assert rows() is first
        assert again is first
    assert rows() is not first
    (first.sum() + (2 * again).sum()).backward()
    assert isinstance(weight.grad, DTensor)
    torch.testing.assert_close(weight.grad.to_local(), torch.full((3, 4), 3.0), rtol=0, atol=0)


def test_one_tensor_for_all_uses_of_a_process_s_rows(tmp_path: Path) -> None:
    run(2, tmp_path, one_tensor_for_all, tmp_path)


def test_tokens_of_ones_own_need_a_group() -> None:
    x, head = torch.randn(3, 4), Head(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"own_tokens needs the group of processes .* group None"):
        linear_divergence(
            *(x, head, x, head, DivergenceSpec("jsd")), weights=torch.ones(3), own_tokens=True
        )
