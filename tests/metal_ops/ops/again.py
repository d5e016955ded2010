"""The tests of the ops once more, with another backend in place of the chunked one."""

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

from metal_ops import _dispatch
from tests.metal_ops.ops import test_grid as grid
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops import test_special_values as special
from tests.metal_ops.ops import test_values as values

# What a kernel backend must pass too: all but those about chunks, and about one device's memory.
TESTS: tuple[Callable[..., None], ...] = (
    values.test_value_and_gradient,
    values.test_value_and_gradient_of_a_real_vocabulary,
    values.test_non_contiguous_rows_and_columns,
    values.test_leading_dimensions_are_kept,
    values.test_clip_is_autograd_of_the_definition,
    values.test_clip_above_every_value_changes_nothing,
    values.test_mask_is_selection,
    values.test_masked_rows_may_hold_anything,
    values.test_everything_masked_is_zero,
    special.test_entries_masked_on_both_sides_contribute_nothing,
    special.test_an_entry_masked_on_one_side,
    special.test_disjoint_supports_reach_the_bound_of_the_jsd,
    special.test_a_kl_with_its_reference_side_masked,
    special.test_equal_inputs_give_zero,
    special.test_nearly_equal_rows_keep_three_digits,
    special.test_nearly_equal_rows_are_not_negative,
    special.test_jsd_near_the_ends_of_beta,
    special.test_a_nan_stays_in_its_row,
    special.test_stats,
    special.test_top1_agreement_tells_rows_apart,
    special.test_entropy_ignores_masked_entries,
    grid.test_supports,
    grid.test_supports_with_masked_entries,
    grid.test_no_row_counts,
    grid.test_supports_of_a_real_vocabulary,
    grid.test_weighted,
    grid.test_weighted_of_a_real_vocabulary,
    grid.test_sparse,
    grid.test_sparse_of_a_real_vocabulary,
    grid.test_linear,
    linear.test_equals_the_composition,
    linear.test_uneven_chunks_match_the_composition,
    linear.test_a_token_of_no_weight_is_silent,
)


def _parameters(test: Callable[..., None], wide: bool) -> Iterator[dict[str, Any]]:
    """The arguments of a test's marks; not those of float64, which kernels do not take."""
    lists = []
    for mark in getattr(test, "pytestmark", []):
        names = [n.strip() for n in mark.args[0].split(",")]
        rows = [x if len(names) > 1 else (x,) for x in mark.args[1]]
        lists.append([dict(zip(names, row, strict=True)) for row in rows])
    for parts in product(*lists):
        arguments = {k: v for part in parts for k, v in part.items()}
        if wide or torch.float64 not in arguments.values():
            yield arguments


def again(
    *, every: int = 1, tests: tuple[Callable[..., None], ...] = TESTS, wide: bool = False
) -> list[Any]:
    """Parameters (test, arguments): each `every`-th of a test's, and its first.

    With `wide`, those of float64 too.
    """
    return [
        pytest.param(test, arguments, id=f"{test.__name__}-{i}")
        for test in tests
        for i, arguments in enumerate(_parameters(test, wide))
        if i % every == 0
    ]


def use(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op on the backend from here on."""
    monkeypatch.setattr(_dispatch, "select", lambda *_: backend)


def run(
    backend: ModuleType,
    test: Callable[..., None],
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test with every op on the backend."""
    use(backend, monkeypatch)
    if "monkeypatch" in inspect.signature(test).parameters:
        arguments = arguments | {"monkeypatch": monkeypatch}
    test(**arguments)
