"""The tests of the ops once more, by the Metal kernels on the simulator."""

import pytest
import torch

from metal_ops import DivergenceSpec, divergence
from metal_ops.backends import metal
from tests.metal_ops.ops import test_hidden as hidden
from tests.metal_ops.ops.again import TESTS, again, run

HIDDEN = (
    hidden.test_value_and_gradient,
    hidden.test_non_contiguous_rows_and_columns,
    hidden.test_near_identical_rows_keep_their_digits,
    hidden.test_a_nan_stays_in_its_row,
    hidden.test_no_rows_and_leading_dimensions,
)
ALL = (*TESTS, *HIDDEN)

pytestmark = pytest.mark.usefixtures("fast")


@pytest.mark.parametrize(("test", "arguments"), again(every=37, tests=ALL))
def test_some(test, arguments, monkeypatch):
    run(metal, test, arguments, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again(tests=ALL))
def test_all(test, arguments, monkeypatch):
    run(metal, test, arguments, monkeypatch)


def test_auto_takes_the_kernels():
    student, teacher = torch.randn(2, 5, 33)
    spec = DivergenceSpec("jsd")
    auto, metal_, chunked = (
        divergence(student, teacher, spec, backend=b) for b in ("auto", "metal", "chunked")
    )
    assert torch.equal(auto, metal_)
    assert not torch.equal(auto, chunked)  # another order of the sums


def test_a_row_of_nothing_is_nan():
    student, teacher = torch.randn(2, 3, 33)
    student[0], teacher[1] = -torch.inf, -torch.inf
    for kind in ("forward_kl", "jsd", "tvd"):
        loss = divergence(student, teacher, DivergenceSpec(kind), backend="metal")
        assert loss.isnan().tolist() == [True, True, False]
        want = divergence(student, teacher, DivergenceSpec(kind), backend="chunked")
        assert want.isnan().tolist() == [True, True, False]
