"""The ops in PyTorch, a block of tokens at a time: runs on every device torch has.

Shapes: N tokens, V vocabulary, H hidden. Arithmetic is float32 for every input dtype (float64 for
float64 input). With p the teacher and q the student, each kind is given by its terms f and by
h = d f / d log q, from which the gradient for student logit k is (h_k - q_k sum(h)) / temperature.
"""

import torch
from torch import Tensor

from metal_ops.spec import DivergenceSpec

# Bytes of one float32 [rows, V] buffer: on a CPU the handful of buffers of a block should stay in
# cache (about 2.4 MB was best on a 1 MB L2 / 32 MB L3 part); elsewhere launches should be few.
ROW_BYTES = {"cpu": 2432 * 1024}
ROW_BYTES_DEFAULT = 64 * 2**20
# The same for the logits of one chunk of the linear op, which must be large enough for its GEMMs.
LINEAR_BYTES = {"cpu": 32 * 2**20}
LINEAR_BYTES_DEFAULT = 256 * 2**20
MIN_LINEAR_TOKENS = 128

NUM_STATS = 4  # student entropy, teacher entropy, top-1 agreement, clipped


def unsupported(student: Tensor, teacher: Tensor) -> str | None:
    """Why this backend cannot take these tensors, or None when it can."""
    for tensor in (student, teacher):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            return f"needs float16, bfloat16, float32 or float64, got {tensor.dtype}"
    return None


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tokens_per_chunk(x: Tensor, vocab: int, budget: dict[str, int], default: int) -> int:
    return max(1, budget.get(x.device.type, default) // (4 * max(1, vocab)))


def _row_splits(x: Tensor) -> list[slice]:
    step = _tokens_per_chunk(x, x.shape[-1], ROW_BYTES, ROW_BYTES_DEFAULT)
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def _log_mix(d: Tensor, beta: float) -> Tensor:
    """log(1 - beta + beta exp(d))."""
    if beta <= 0.99:
        return torch.expm1(d).mul_(beta).log1p_()
    # 1 - beta is lost in beta expm1(d) for a very negative d
    far = torch.exp(d).mul_(beta).add_(1 - beta).log_()
    return torch.where(d < -0.5, far, torch.expm1(d).mul_(beta).log1p_())


def _terms(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spec: DivergenceSpec
) -> tuple[Tensor, Tensor]:
    """(f, h), each [rows, V]. h may omit a multiple of q, which the centring removes."""
    d = log_p - log_q
    if spec.kind == "forward_kl":
        return p * d.masked_fill_(p == 0, 0.0), -p
    if spec.kind == "reverse_kl":
        f = q * d.neg_().masked_fill_(q == 0, 0.0)
        return f, f
    # log(q/m) and log(p/m) from d = log(p/q): exact to first order where p and q nearly agree,
    # which log(beta p + (1 - beta) q) is not. Both sides -inf give d = nan and p = q = 0.
    limit = 700.0 if d.dtype == torch.float64 else 88.0
    d = d.clamp_(-limit, limit).masked_fill_((p == 0) & (q == 0), 0.0)
    log_q_m = _log_mix(d, spec.beta).neg_()
    log_p_m = _log_mix(d.neg_(), 1 - spec.beta).neg_()
    h = log_q_m.mul_(q).mul_(1 - spec.beta)
    return log_p_m.mul_(p).mul_(spec.beta).add_(h), h


def _clip(
    f: Tensor, h: Tensor, q: Tensor, clip: float, spec: DivergenceSpec
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """(loss per token, h, factor of the token's gradient, whether the token was clipped)."""
    if spec.clip_level == "vocab_entry":
        # the clamp breaks the sum apart, so h must be the whole derivative of each entry
        whole = h + q if spec.kind == "reverse_kl" else h
        over = f > clip
        return f.clamp(max=clip).sum(-1), whole.masked_fill(over, 0.0), 1.0, over.any(-1)
    loss = f.sum(-1)
    over = loss > clip
    factor = torch.zeros_like(loss) if spec.clip_level == "token" else clip / loss
    return loss.clamp(max=clip), h, torch.where(over, factor, 1.0), over


def _stats(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, clipped: Tensor | None) -> Tensor:
    """[NUM_STATS, rows]."""
    student_entropy = -(q * log_q.masked_fill(q == 0, 0.0)).sum(-1)
    teacher_entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).to(p.dtype)
    clipped = torch.zeros_like(agree) if clipped is None else clipped.to(p.dtype)
    return torch.stack([student_entropy, teacher_entropy, agree, clipped])


def _log_softmax(x: Tensor) -> Tensor:
    # torch.log_softmax sums in order on a CPU: 1e-4 off for a peaked row of 150 000 entries
    return x - torch.logsumexp(x, dim=-1, keepdim=True)


def _rows(
    student: Tensor, teacher: Tensor, spec: DivergenceSpec, want_grad: bool, want_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss [rows], d loss / d student [rows, V], stats [NUM_STATS, rows]) of one block."""
    dtype = _out_dtype(student)
    log_q = _log_softmax(student.to(dtype) / spec.temperature)
    log_p = _log_softmax(teacher.to(dtype) / spec.temperature)
    p, q = log_p.exp(), log_q.exp()
    f, h = _terms(log_p, log_q, p, q, spec)
    factor, clipped = 1.0, None
    if spec.clip is not None:
        loss, h, factor, clipped = _clip(f, h, q, spec.clip, spec)
    else:
        if spec.kind != "jsd":
            # p d - p + q >= 0 has the same sum as p d, without the terms of first order
            a, b, d = (p, q, log_p - log_q) if spec.kind == "forward_kl" else (q, p, log_q - log_p)
            f = f + torch.where(d.abs() < 1, a * torch.expm1(-d), b - a)
        loss = f.sum(-1)
    grad = None
    if want_grad:
        scale = factor * (spec.scale / spec.temperature)
        scale = scale[:, None] if isinstance(scale, Tensor) else scale
        grad = (h - q * h.sum(-1, keepdim=True)) * scale
    stats = _stats(log_p, log_q, p, q, clipped) if want_stats else None
    return loss * spec.scale, grad, stats


def _out_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None, spec: DivergenceSpec, want_stats: bool
) -> tuple[Tensor, Tensor]:
    """(loss [N], stats [NUM_STATS, N or 0]); both zero where mask is False."""
    if mask is not None:
        index = mask.nonzero().squeeze(-1)
        loss = student.new_zeros(student.shape[0], dtype=_out_dtype(student))
        num_stats_rows = student.shape[0] if want_stats else 0
        stats = loss.new_zeros(NUM_STATS, num_stats_rows)
        kept, kept_stats = forward(student[index], teacher[index], None, spec, want_stats)
        loss[index] = kept
        if want_stats:
            stats[:, index] = kept_stats
        return loss, stats
    loss = student.new_empty(student.shape[0], dtype=_out_dtype(student))
    stats = loss.new_empty(NUM_STATS, student.shape[0] if want_stats else 0)
    for rows in _row_splits(student):
        loss[rows], _, block = _rows(student[rows], teacher[rows], spec, False, want_stats)
        if block is not None:
            stats[:, rows] = block
    return loss, stats


def backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, spec: DivergenceSpec
) -> Tensor:
    """Gradient for the student logits, [N, V] in the dtype of `student`."""
    out = torch.empty_like(student)
    for rows in _row_splits(student):
        _, grad, _ = _rows(student[rows], teacher[rows], spec, True, False)
        assert grad is not None
        grad.mul_(upstream[rows, None])
        if mask is not None:
            grad.masked_fill_(~mask[rows, None], 0.0)
        out[rows] = grad
    return out


def _softcap(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """What the model does to its head's output: scale, then cap * tanh(. / cap)."""
    logits = _upcast(logits) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)


def _project_both(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None, Tensor | None],
    chunk: slice,
) -> tuple[Tensor, Tensor]:
    """Logits of both sides for one chunk of tokens; one product when they share a head."""
    hidden, weight, bias = student
    teacher_hidden, teacher_weight, teacher_bias = teacher
    if teacher_weight is not None:
        teacher_logits = _project(teacher_hidden[chunk], teacher_weight, teacher_bias)
        return _project(hidden[chunk], weight, bias), teacher_logits
    both = _project(torch.cat([hidden[chunk], teacher_hidden[chunk]]), weight, bias)
    student_logits, teacher_logits = both.chunk(2)
    return student_logits, teacher_logits


def _mix(
    student_logits: Tensor,
    teacher_logits: Tensor,
    post: tuple[float, float | None, float, float | None],
    weights: Tensor,
    labels: Tensor | None,
    spec: DivergenceSpec,
    alpha: float,
    want_grad: bool,
) -> Tensor:
    """Values per token [2 + NUM_STATS, rows]: soft, hard, stats.

    With `want_grad`, student_logits is overwritten by the gradient of the weighted mix.
    """
    student = _softcap(student_logits, *post[:2])
    soft, grad, stats = _rows(student, _softcap(teacher_logits, *post[2:]), spec, want_grad, True)
    assert stats is not None
    hard = torch.zeros_like(soft)
    if grad is not None:
        # a zero weight silences a token even where its gradient is infinite
        grad.mul_((weights * alpha)[:, None]).masked_fill_((weights * alpha == 0)[:, None], 0.0)
    if labels is not None:
        log_q = torch.log_softmax(student, dim=-1)
        hard = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        if grad is not None and alpha < 1.0:
            share = (weights * (1 - alpha))[:, None]
            grad.addcmul_(log_q.exp_(), share).scatter_add_(-1, labels[:, None], -share)
    if grad is not None:
        if post[1] is not None:
            grad.mul_(1 - (student / post[1]).square_())
        student_logits.copy_(grad.mul_(post[0]))
    return torch.cat([soft[None], hard[None], stats])


def linear(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None, Tensor | None],
    post: tuple[float, float | None, float, float | None],
    weights: Tensor,
    labels: Tensor | None,
    spec: DivergenceSpec,
    alpha: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of weights (alpha soft + (1 - alpha) hard) from hidden states, and its gradients.

    Args:
        student: hidden states [N, H], head weight [V, H], head bias [V] or None.
        teacher: the same of the teacher; weight None is the student's head for both sides, whose
            two products are then one.
        post: student logit scale and softcap, teacher logit scale and softcap.
        weights: [N] float32.
        labels: [N] int64 or None.
        spec: the divergence.
        alpha: share of the divergence.
        needs: whether gradients of hidden states, weight and bias are wanted.

    Returns:
        loss []; soft and hard [2, N]; stats [NUM_STATS, N]; gradients of hidden states, weight and
        bias, or None. The gradient of the weight accumulates in float32.
    """
    hidden, weight = student[:2]
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    accumulator = _out_dtype(weight)
    values = weight.new_zeros(2 + NUM_STATS, num_tokens, dtype=accumulator)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=accumulator) if needs[1] else None
    grad_bias = weight.new_zeros(vocab, dtype=accumulator) if needs[2] else None
    tokens = _tokens_per_chunk(hidden, vocab, LINEAR_BYTES, LINEAR_BYTES_DEFAULT)
    tokens = max(tokens, MIN_LINEAR_TOKENS)
    for start in range(0, num_tokens, tokens):
        at = slice(start, min(start + tokens, num_tokens))
        logits, teacher_logits = _project_both(student, teacher, at)
        values[:, at] = torch.cat(
            [
                _mix(
                    logits[rows],
                    teacher_logits[rows],
                    post,
                    weights[at][rows],
                    None if labels is None else labels[at][rows],
                    spec,
                    alpha,
                    any(needs),
                )
                for rows in _row_splits(logits)
            ],
            dim=1,
        )
        # the chunk's logits now hold their gradient
        if grad_hidden is not None:
            grad_hidden[at] = logits @ weight
        if grad_weight is not None:
            grad_weight += logits.T @ hidden[at].to(weight.dtype)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=accumulator)
    loss = weights.new_zeros((), dtype=accumulator)
    for share, per_token in ((alpha, values[0]), (1 - alpha, values[1])):
        if share:  # a side without a share may be infinite
            loss = loss + share * (weights * per_token).masked_fill(weights == 0, 0.0).sum()
    return loss, values[:2].clone(), values[2:].clone(), grad_hidden, grad_weight, grad_bias
