"""The table of memory plans on the page of engines is what the formulas say."""

import pytest

from tests.docs.plans import PAGE, written


@pytest.mark.slow
def test_the_table_of_plans_is_computed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "<!-- plans -->" in text
    assert written(text) == text
