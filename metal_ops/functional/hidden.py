"""Compares hidden states."""

import torch
from torch import Tensor

from metal_ops import _ops
from metal_ops.functional._arguments import (
    check_pair,
    flat_mask,
    forbid_second_derivative,
    form_gradient,
)
from metal_ops.reference import HIDDEN_KINDS


def hidden_divergence(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the difference between hidden states, per token.

    Args:
        student: [..., hidden]; float32, bfloat16, float16 or float64.
        teacher: [..., hidden]; may differ in dtype. Receives no gradient.
        kind: "mse", the mean over the hidden dimension of (student - teacher)^2; or "cosine", one
            less the cosine of the angle between them, in [0, 2].
        mask: [...] bool or None; where False the result and its gradient are zero and nothing is
            computed.
        backend: as in `divergence`.

    Returns:
        [...] float32 (float64 for a float64 student).

    Raises:
        ValueError: shapes, devices or the mask disagree; the kind or the backend is unknown.
        NotImplementedError, RuntimeError: as `divergence`.

    Numerics:
        float32 inside for every input dtype but float64. The cosine comes from the difference of
        the directions, not as one less a product, so that it keeps its digits where both sides
        nearly agree. A row shorter than 1e-8 counts as one of that length (two rows of zeros are
        one apart); the square of a row's length must fit into the dtype inside. The gradient is
        formed when that of `divergence` is. A NaN stays in its row.

    Source:
        As `torch.nn.functional.mse_loss` and `cosine_similarity`; `metal_ops.reference`.
    """
    if kind not in HIDDEN_KINDS:
        raise ValueError(f"kind must be one of {HIDDEN_KINDS}, got {kind!r}")
    check_pair(student, teacher, "student and teacher", "hidden")
    shape, hidden = student.shape[:-1], student.shape[-1]
    mask = flat_mask(mask, shape)
    loss, _ = _ops.hidden_divergence(
        student=forbid_second_derivative(student).reshape(-1, hidden),
        teacher=teacher.detach().reshape(-1, hidden),
        weights=None if mask is None else mask.to(torch.float32),
        kind=kind,
        want_grad=form_gradient(student),
        backend=backend,
    )
    return loss.view(shape)
