"""Whether tokens are the greedy ones, judged without cache, padding or company."""

from collections.abc import Sequence
from typing import Any

import torch

# logits go up to 2 here, where bfloat16's spacing is 2^-7; measured: 0 in both
GAPS = {torch.float32: 1e-4, torch.bfloat16: 0.03}


@torch.no_grad()
def greedy_gap(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> float:
    """How far a chosen token's logit is below the largest one, at worst."""
    worst = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        for i, token in enumerate(completion, len(prompt)):
            logits = model(input_ids=ids[:, :i], use_cache=False).logits[0, -1].float()
            worst = max(worst, (logits.max() - logits[token]).item())
    return worst
