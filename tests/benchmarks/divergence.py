"""Losses from logits: `python -m tests.benchmarks.divergence --allocator keep`.

Forward and backward of a mean over tokens, against the eager formula, TRL, and torch.compile.
"""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL reads it when imported

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.experimental.gkd import GKDTrainer

from hf_distill import generalized_jsd_loss
from metal_ops import DivergenceSpec, divergence
from tests.benchmarks import timing

BETAS = {"forward_kl": 0, "jsd": 0.5, "reverse_kl": 1}


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


def main() -> None:
    """Time every shape, dtype and kind asked for."""
    options = timing.arguments(__doc__, ["256x32000", "128x151936", "512x151936"])
    compiled = torch.compile(eager, dynamic=False)
    for shape in options.shapes:
        rows, vocab = map(int, shape.split("x"))
        for dtype in options.dtypes:
            student, teacher = (
                torch.randn(rows, vocab).mul_(3).to(getattr(torch, dtype)) for _ in range(2)
            )
            for kind in options.kinds:
                beta = BETAS[kind]
                spec = DivergenceSpec(kind)
                functions = {
                    "generalized_jsd_loss": lambda x, y, b=beta: generalized_jsd_loss(x, y, beta=b),
                    "divergence().mean()": lambda x, y, s=spec: divergence(x, y, s).mean(),
                    "eager": lambda x, y, b=beta: eager(x, y, b),
                    "TRL GKD": lambda x, y, b=beta: GKDTrainer.generalized_jsd_loss(x, y, beta=b),
                    "torch.compile(eager)": lambda x, y, b=beta: compiled(x, y, b),
                }

                def run(function, x=student, y=teacher) -> float:
                    leaf = x.detach().requires_grad_()
                    loss = function(leaf, y)
                    loss.backward()
                    return loss.item()

                steps = {n: lambda f=f, run=run: run(f) for n, f in functions.items()}
                if options.memory_of:
                    print(timing.peak_mb(steps[options.memory_of]))
                    return
                timing.report(
                    f"{kind} {shape} {dtype}",
                    steps,
                    options,
                    lambda name, case=(shape, dtype, kind): timing.memory_in_a_process(
                        "tests.benchmarks.divergence", name, *case
                    ),
                )


if __name__ == "__main__":
    main()
