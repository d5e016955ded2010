"""Losses from hidden states and heads: `python -m tests.benchmarks.linear --allocator keep`.

Forward and backward of a mean over tokens, against logits in memory, TRL, and Liger. The teacher
has a head of its own; the student's is trained, or frozen as with LoRA. "products" is the floor:
the matrix products alone, over the same chunks and in the same dtype as ours. Errors are those of
the loss and of the gradient of the hidden states, over the first tokens.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from metal_ops import DivergenceSpec, Head, linear_divergence
from metal_ops.backends.blocks.sizes import product_dtype, tokens_per_chunk
from metal_ops.selftest.numerics import definition
from tests.benchmarks import timing
from tests.benchmarks.divergence import BETAS, NO_LIGER, Liger, eager

LIGER_KINDS = ("jsd",)
LIGER_CHUNK = 1024  # its default
ERROR_ROWS = 64
# hidden states and head of the student, and of the teacher
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def ours(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, kind: str) -> Tensor:
    weights = torch.full((len(h),), 1 / len(h), device=h.device)
    return linear_divergence(h, Head(w), th, Head(tw), DivergenceSpec(kind), weights=weights).loss


def naive(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, kind: str) -> Tensor:
    return eager(h @ w.T, th @ tw.T, BETAS[kind])


def trl(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, kind: str) -> Tensor:
    """Its chunks are 4096 tokens by 32768 entries; 0 is the forward KL, as in `BETAS`."""
    return ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, float(BETAS[kind]))[0].mean()


def liger(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, kind: str, compiled: bool) -> Tensor:
    """A mean over the labels that are not -100, whose own loss weighs nothing."""
    assert Liger is not None
    labels = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    settings = (0.0, 1.0, BETAS[kind], -100, 1.0, compiled, LIGER_CHUNK)
    return Liger.apply(h, w, th, tw, labels, None, None, *settings)


def exact(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, kind: str) -> Tensor:
    """The definition on float64 logits; `h` is float64."""
    with torch.no_grad():
        teacher = th.double() @ tw.double().T
    return definition(h @ w.detach().double().T, teacher, DivergenceSpec(kind)).mean()


class Products:
    """The matrix products of a forward and backward, into buffers that stay between calls."""

    def __init__(
        self, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, trained: bool, dtype: torch.dtype
    ) -> None:
        self.tokens = min(tokens_per_chunk(h, w), len(h))
        h, w, th, tw = self.inputs = (h.to(dtype), w.to(dtype), th.to(dtype), tw.to(dtype))
        self.logits = [w.new_empty(self.tokens, len(w)) for _ in range(2)]
        self.grad_hidden = torch.empty_like(h)
        wide = torch.promote_types(dtype, torch.float32)
        self.grad_weight = torch.zeros_like(w, dtype=wide) if trained else None
        self.product = torch.empty_like(w) if trained and dtype != wide else None

    def __call__(self, rows: int | None) -> tuple[float, None]:
        """The sum in `grad_weight` goes on from call to call."""
        h, w, th, tw = self.inputs
        count = len(h[:rows])
        for start in range(0, count, self.tokens):
            at = slice(start, min(start + self.tokens, count))
            student, teacher = (x[: at.stop - start] for x in self.logits)
            torch.mm(h[at], w.T, out=student)
            torch.mm(th[at], tw.T, out=teacher)
            torch.mm(student, w, out=self.grad_hidden[at])
            if self.grad_weight is None:
                continue
            if self.product is None:
                self.grad_weight.addmm_(student.T, h[at])
            else:
                self.grad_weight.add_(torch.mm(student.T, h[at], out=self.product))
        return float("nan"), None


def make_side(tokens: int, size: int, vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Hidden states, and a head that makes logits of standard deviation 3 of them."""
    hidden, weight = torch.randn(tokens, size), torch.randn(vocab, size).mul_(3 / size**0.5)
    return hidden.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))


def make_variants(
    inputs: Inputs, kind: str, trained: bool
) -> tuple[dict[str, timing.Variant], timing.Variant]:
    """What is compared, and the definition in float64."""
    hidden, weight, teacher_hidden, teacher_weight = inputs

    def run(
        function: Callable[..., Tensor], rows: int | None, dtype: torch.dtype = hidden.dtype
    ) -> tuple[float, Tensor | None]:
        h = hidden[:rows].detach().to(dtype).requires_grad_()
        w = weight.detach().requires_grad_(trained)
        loss = function(h, w, teacher_hidden[:rows], teacher_weight, kind)
        loss.backward()
        return loss.item(), h.grad

    functions: dict[str, Callable[..., Tensor]] = {
        "linear_divergence": ours,
        "naive": naive,
        "TRL chunked": trl,
    }
    if Liger is not None and kind in LIGER_KINDS:
        functions["Liger"] = partial(liger, compiled=False)
        functions["Liger, compiled"] = partial(liger, compiled=True)
    variants: dict[str, timing.Variant] = {n: partial(run, f) for n, f in functions.items()}
    variants["products"] = Products(*inputs, trained, product_dtype(weight))
    if product_dtype(weight) != weight.dtype:
        variants["products, 16 bit"] = Products(*inputs, trained, weight.dtype)
    return variants, partial(run, exact, dtype=torch.float64)


def main() -> None:
    """Time every shape, dtype, kind and head asked for."""
    default = ["512x896x151936", "1024x576x49152"]
    options = timing.arguments(__doc__, default, heads=["trained", "frozen"])
    if Liger is None:
        print(NO_LIGER)
    for case in product(options.shapes, options.dtypes, options.kinds, options.heads):
        shape, dtype, kind, head = case
        torch.compiler.reset()  # the limit of compilations counts those of earlier cases
        torch.manual_seed(0)
        tokens, size, vocab = map(int, shape.split("x"))
        inputs = (*make_side(tokens, size, vocab, dtype), *make_side(tokens, size, vocab, dtype))
        variants, in_float64 = make_variants(inputs, kind, head == "trained")
        if options.memory_of:
            print(timing.peak_mb(variants[options.memory_of]))
            return
        if Liger is not None and kind not in LIGER_KINDS:
            print(f"\nno rows of Liger: measured for {', '.join(LIGER_KINDS)} only, not {kind}")
        timing.drop_if_broken(variants, "Liger, compiled")
        memory = partial(
            timing.memory_in_a_process,
            "tests.benchmarks.linear",
            shapes=shape,
            dtypes=dtype,
            kinds=kind,
            heads=head,
        )
        title = f"{kind} {shape} {dtype}, {head} head"
        timing.report(title, variants, in_float64, ERROR_ROWS, options, memory)


if __name__ == "__main__":
    main()
