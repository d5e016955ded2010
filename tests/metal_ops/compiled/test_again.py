"""The tests of the ops with the compiled backend: a few graphs, and all of them when slow."""

import pytest
import torch

from metal_ops.backends import compiled
from metal_ops.backends.blocks import terms
from metal_ops.backends.compiled import graphs
from metal_ops.selftest.inputs import FAMILIES
from tests.metal_ops.ops import test_linear as linear
from tests.metal_ops.ops import test_values as values
from tests.metal_ops.ops.again import again, run, use

SAMPLE = 29


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are the functions themselves, run as a compiler would trace them."""
    monkeypatch.setattr(graphs, "_graphs", {})
    monkeypatch.setattr(graphs, "_compile", lambda key, function: function)
    monkeypatch.setattr(terms, "_traced", lambda: True)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize(
    ("test", "arguments"),
    again(every=SAMPLE) + again(tests=(values.test_clip_is_autograd_of_the_definition,)),
)
def test_what_is_compiled(test, arguments, monkeypatch):
    run(compiled, test, arguments, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("i", [4, 5, 6])
def test_a_graph(i, family, monkeypatch):
    """Those of the JSD, which serve every beta and temperature."""
    arguments = {"spec": values.SPECS[i], "dtype": torch.float32, "family": family}
    assert arguments["spec"].kind == "jsd"
    run(compiled, values.test_value_and_gradient, arguments, monkeypatch)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("head", linear.HEADS)
def test_heads(head, alpha, monkeypatch):
    """By a graph of `test_a_graph`."""
    use(compiled, monkeypatch)
    assert linear.SPECS[2].kind == "jsd"
    linear.check(linear.make(head, torch.float32), linear.SPECS[2], alpha, upstream=2.75)


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), again())
def test_again_all(test, arguments, monkeypatch):
    run(compiled, test, arguments, monkeypatch)
