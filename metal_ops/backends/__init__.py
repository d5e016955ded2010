"""One module per backend: `chunked` in PyTorch, `compiled` by it, kernels in `triton` and `metal`.

Each defines `unsupported`, which says why it cannot take some tensors, and the functions of the
ops: `forward` and `backward` of logits, `sparse`, `linear` and `hidden_states`. What the backends
share lies beside them: `kernels` makes ops of kernels, `blocks` computes blocks of rows in PyTorch,
and `compare` says whether two backends agree.
"""

__all__: list[str] = []  # a backend is imported when it is first asked for

KERNEL_DEVICES = {
    "metal": ["mps"],
    "triton": ["cuda", "xpu"],
    "compiled": ["cpu", "cuda", "xpu", "mps"],
}
"""Device types that a backend's kernels run on; simulators add theirs."""

__all__ = ["KERNEL_DEVICES"]
