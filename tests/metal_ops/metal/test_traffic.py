"""Bytes of device memory that each kernel reads and writes, against what it has to."""

import pytest
import torch

from metal_ops import DivergenceSpec
from metal_ops.backends.metal.launch import Source, group_size
from tests.metal_ops.metal.harness import KERNELS, Rows, expected_hard, gradients

WIDTH = 1003
COUNTED = 3  # rows with a weight, of 4


@pytest.fixture
def rows() -> Rows:
    return Rows.make(WIDTH, torch.bfloat16, strided=True)


def traffic(checked, source: Source, kernel: str) -> dict[str, tuple[int, int]]:
    """(read, written) in passes over the logits of the rows with a weight; bytes of the others."""
    stats = checked.stats(source, kernel).buffers
    passes, lines = {}, []
    for name, (read, written, _) in stats.items():
        both = read, written
        if name in ("student", "teacher", "logits", "out"):
            both = tuple(n / (COUNTED * WIDTH * 2) for n in both)
        passes[name] = both
        lines.append(f"{name} {both[0]:g}/{both[1]:g}")
    print(f"{kernel}: read/written", ", ".join(lines))
    return passes


ALL_ROWS = 4 / 3  # a row without weight is written too, with zeros


def test_divergence(checked, rows):
    spec = DivergenceSpec("jsd", 0.3, 1.7)
    source = Source("divergence", torch.bfloat16, "jsd")
    values = KERNELS.forward(rows.student, rows.teacher, rows.weights, spec)
    forward = traffic(checked, source, "divergence_forward")
    assert (forward["student"], forward["teacher"]) == ((2, 0), (2, 0))
    assert forward["values"] == (0, values.nbytes)
    hard, _ = expected_hard(rows, rows.weights)
    for term, suffix in ((None, ""), (hard, "_hard")):
        list(gradients(rows, values, rows.weights, spec, term))
        apart = traffic(checked, source, f"divergence_backward{suffix}")
        assert (apart["student"], apart["teacher"]) == ((1, 0), (1, 0))
        assert apart["out"] == (0, ALL_ROWS)
        within = traffic(checked, source, f"divergence_backward{suffix}_in_place")
        assert (within["student"], within["teacher"]) == ((1, ALL_ROWS), (1, 0))


def test_one_side(checked, rows):
    source, num_kept = Source("logits", torch.bfloat16), 50
    x = rows.student.clone()
    x[1] = 0.0
    ids = torch.arange(num_kept, dtype=torch.int32).repeat(4, 1) * 20
    KERNELS.log_sums(x, ids, 1.0)
    sums = traffic(checked, source, "log_sums")
    assert sums["logits"] == (ALL_ROWS, 0)  # log_sums knows no weights
    # every thread goes through the ids once; the 32 of a simdgroup at nearly the same place
    assert sums["ids"][0] <= ids.nbytes * group_size(WIDTH, 1024)
    assert sums["ids"][0] >= ids.nbytes
    KERNELS.spread(x, torch.ones(4), rows.weights, 1.0, rows.out)
    spread = traffic(checked, source, "spread")
    assert (spread["logits"], spread["out"]) == ((1, 0), (0, ALL_ROWS))


def test_hidden(checked, rows):
    source = Source("hidden", torch.bfloat16)
    x, y = (torch.where(z.isfinite() | z.isnan(), z, 0.0) for z in (rows.student, rows.teacher))
    for kind, passes in (("mse", 1), ("cosine", 2)):
        KERNELS.hidden_states(x, y, rows.weights, kind, torch.empty_like(x))
        loss = traffic(checked, source, kind)
        assert (loss["student"], loss["teacher"]) == ((passes, 0), (passes, 0))
        gradient = traffic(checked, source, f"{kind}_gradient")
        assert (gradient["student"], gradient["teacher"]) == ((1, 0), (1, 0))
        assert gradient["out"] == (0, ALL_ROWS)
