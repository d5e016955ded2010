"""The memory of a loss in plain PyTorch beside that of the fused operation."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_distill.losses import DivergenceLoss, Tokens, as_loss
from hf_distill.models.signals import Head, Signal
from metal_ops import DivergenceSpec
from tests.benchmarks.timing import peak_mb
from tests.hf_distill.trainers.own_losses import TEMPERATURE, jsd

ROOT = Path(__file__).parents[3]
# times the memory of the built-in JSD; 0.63 to 1.88 in these cases, whose chunks are 48 MiB
# a side in the built-in, and a dozen copies of the logits of 128 tokens in an own loss
MOST = 2.0
SPEC = DivergenceSpec("jsd", temperature=TEMPERATURE, temperature_scaling="t2")
# tokens, width, vocabulary; with more than a chunk of either loss
SMALL, LARGE = (1200, 32, 8192), (400, 32, 49152)
# and alpha, and whether the head is trained
CASES = [(SMALL, 0.5, True), (SMALL, 1.0, False), (LARGE, 1.0, True), (LARGE, 0.5, False)]


def step(
    own: bool, shape: tuple[int, int, int], alpha: float, trained: bool
) -> Callable[..., None]:
    """Forward and backward of a loss from hidden states."""
    count, width, vocab = shape
    made = torch.Generator().manual_seed(0)
    hidden = [torch.randn(count, width, generator=made).requires_grad_(i == 0) for i in range(2)]
    heads = [torch.randn(vocab, width, generator=made) / width**0.5 for _ in range(2)]
    heads[0].requires_grad_(trained)
    tokens = Tokens(torch.arange(count), torch.full((count,), 1 / count))
    built_in = DivergenceLoss(SPEC, alpha)
    loss = as_loss(jsd).with_share(alpha, False) if own else built_in

    def run(_: None) -> None:
        sides = (Signal(hidden=x, head=Head(w, None)) for x, w in zip(hidden, heads, strict=True))
        loss(*sides, tokens).loss.backward()
        hidden[0].grad = heads[0].grad = None
        gc.collect()

    return run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak")
def test_an_own_jsd_needs_little_more_memory_than_the_built_in() -> None:
    """What a step adds to the peak of a process, with the chunks of the default."""
    # glibc would keep some of what is freed: what is larger than this goes back at once
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.hf_distill.losses.test_own_loss_memory"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert len(measured) == len(CASES)
    for name, (built_in, own) in measured.items():
        print(f"{name}: {built_in:.0f} MB, own {own:.0f} MB, {own / built_in:.2f} times")
        assert built_in > 50
        assert own <= MOST * built_in, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {str(case): [peak_mb(step(own, *case)) for own in (False, True)] for case in CASES}
    print(json.dumps(results))
