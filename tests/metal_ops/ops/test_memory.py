"""What the ops from logits allocate."""

import pytest
import torch

from metal_ops import DivergenceSpec, divergence, weighted_divergence
from metal_ops.backends import chunked
from metal_ops.backends.blocks import sizes
from metal_ops.selftest.inputs import randn
from tests.metal_ops.ops.watching import Watch

SPECS = [DivergenceSpec(kind) for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")]
ROWS, VOCAB = 40, 300


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_backward_only_hands_the_gradient_on(spec, weighted):
    student, teacher = randn(ROWS, VOCAB)
    student.requires_grad_()
    weights = torch.rand(ROWS)
    if weighted:
        loss = weighted_divergence(student, teacher, spec, weights=weights).loss
    else:
        loss = (divergence(student, teacher, spec) * weights).sum()
    with Watch() as mode:
        (loss * 2).backward()
    assert max(mode.sizes) < VOCAB


@pytest.mark.parametrize("want_stats", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_forward_holds_one_gradient_and_buffers_of_a_block(spec, want_stats, monkeypatch):
    monkeypatch.setattr(sizes, "buffer_bytes", lambda _: 4 * VOCAB)  # a row at a time
    student, teacher = randn(ROWS, VOCAB)
    with Watch() as mode:
        chunked.forward(student, teacher, None, spec.resolved(), True, want_stats)
    assert [size for size in mode.sizes if size > 5 * VOCAB] == [ROWS * VOCAB]
