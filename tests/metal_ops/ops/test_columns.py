"""Sums and gradients of parts of the columns, joined, are those of whole rows."""

import pytest

from metal_ops.backends.blocks.columns import COLUMNS
from tests.metal_ops.ops import parts
from tests.metal_ops.ops import test_grid as grid
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops import test_special_values as special
from tests.metal_ops.ops import test_values as values
from tests.metal_ops.ops.again import again, run

# what is about single rows over the whole vocabulary
TESTS = (
    values.test_value_and_gradient,
    values.test_value_and_gradient_of_a_real_vocabulary,
    values.test_clip_is_autograd_of_the_definition,
    special.test_entries_masked_on_both_sides_contribute_nothing,
    special.test_an_entry_masked_on_one_side,
    special.test_disjoint_supports_reach_the_bound_of_the_jsd,
    special.test_a_kl_with_its_reference_side_masked,
    special.test_nearly_equal_rows_keep_three_digits,
    special.test_nearly_equal_rows_are_not_negative,
    special.test_jsd_near_the_ends_of_beta,
    special.test_stats,
    special.test_top1_agreement_tells_rows_apart,
    special.test_entropy_ignores_masked_entries,
    grid.test_weighted,
    linear.test_equals_the_composition,
)


@pytest.mark.parametrize(("test", "arguments"), again(tests=TESTS, every=11))
def test_again(test, arguments, monkeypatch):
    run(parts.backend(COLUMNS), test, arguments, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again(tests=TESTS))
def test_again_all(test, arguments, monkeypatch):
    run(parts.backend(COLUMNS), test, arguments, monkeypatch)
