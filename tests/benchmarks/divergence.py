"""Losses from logits: `python -m tests.benchmarks.divergence --allocator keep`.

Forward and backward of a mean over tokens, against the eager formula, TRL, torch.compile, and the
PyTorch formula in Liger (its kernel for logits needs Triton). Errors are those of the first rows.
"""

import os
from collections.abc import Callable
from functools import partial
from itertools import product

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL reads it when imported

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.experimental.gkd import GKDTrainer

from hf_distill import generalized_jsd_loss
from metal_ops import DivergenceSpec, divergence
from metal_ops.selftest.numerics import definition
from tests.benchmarks import timing

try:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as Liger
except ImportError:
    Liger = None

NO_LIGER = "no rows of Liger: pip install --no-deps liger-kernel"
BETAS = {"forward_kl": 0, "jsd": 0.5, "reverse_kl": 1}
ERROR_ROWS = 16


def eager(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalized JSD as papers' code writes it."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(log_y: Tensor, log_x: Tensor) -> Tensor:
        return F.kl_div(log_y, log_x, reduction="none", log_target=True)  # noqa: TID251

    if beta in (0, 1):
        entries = kl(log_q, log_p) if beta == 0 else kl(log_p, log_q)
    else:
        share = torch.tensor(beta, dtype=log_q.dtype)
        mixed = torch.stack([log_q + torch.log1p(-share), log_p + torch.log(share)])
        log_m = torch.logsumexp(mixed, dim=0)
        entries = share * kl(log_m, log_p) + (1 - share) * kl(log_m, log_q)
    return entries.sum() / len(student)


def make_variants(
    student: Tensor, teacher: Tensor, kind: str
) -> tuple[dict[str, timing.Variant], timing.Variant]:
    """What is compared, and the definition in float64."""
    beta, spec, compiled = BETAS[kind], DivergenceSpec(kind), torch.compile(eager, dynamic=False)
    functions = {
        "generalized_jsd_loss": lambda x, y: generalized_jsd_loss(x, y, beta=beta),
        "divergence().mean()": lambda x, y: divergence(x, y, spec).mean(),
        "eager": lambda x, y: eager(x, y, beta),
        "TRL GKD": lambda x, y: GKDTrainer.generalized_jsd_loss(x, y, beta=beta),
        "torch.compile(eager)": lambda x, y: compiled(x, y, beta),
    }
    if Liger is not None and kind == "jsd":
        sum_over_rows = Liger.distillation_loss_fn
        functions["Liger formula"] = lambda x, y: sum_over_rows(x, y, beta=beta) / len(x)

    def run(
        function: Callable[..., Tensor], rows: int | None, dtype: torch.dtype = student.dtype
    ) -> tuple[float, Tensor | None]:
        leaf = student[:rows].detach().to(dtype).requires_grad_()
        loss = function(leaf, teacher[:rows])
        loss.backward()
        return loss.item(), leaf.grad

    exact = partial(run, lambda x, y: definition(x, y, spec).mean(), dtype=torch.float64)
    return {name: partial(run, function) for name, function in functions.items()}, exact


def main() -> None:
    """Time every shape, dtype and kind asked for."""
    options = timing.arguments(__doc__, ["256x32000", "128x151936", "512x151936"])
    if Liger is None:
        print(NO_LIGER)
    for shape, dtype, kind in product(options.shapes, options.dtypes, options.kinds):
        torch.compiler.reset()  # after 8 cases torch.compile would give up and run the eager code
        torch.manual_seed(0)
        rows, vocab = map(int, shape.split("x"))
        student, teacher = (
            torch.randn(rows, vocab).mul_(3).to(getattr(torch, dtype)) for _ in range(2)
        )
        variants, exact = make_variants(student, teacher, kind)
        if options.memory_of:
            print(timing.peak_mb(variants[options.memory_of]))
            return
        timing.drop_if_broken(variants, "torch.compile(eager)")
        memory = partial(
            timing.memory_in_a_process,
            "tests.benchmarks.divergence",
            shapes=shape,
            dtypes=dtype,
            kinds=kind,
        )
        timing.report(f"{kind} {shape} {dtype}", variants, exact, ERROR_ROWS, options, memory)


if __name__ == "__main__":
    main()
