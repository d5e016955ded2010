"""What a teacher costs in each precision: `python -m tests.benchmarks.precision`.

One random Llama reads the same rows in float32, under bfloat16 autocast and with bfloat16 weights:
the median seconds of its signal with the logits of all tokens, as a share of those in float32, and
how far its distributions are from those in float32.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_distill import ModelTeacher
from hf_distill.data import Side
from metal_ops import DivergenceSpec, divergence

VOCAB = 32_000
SPREAD = 4.0  # standard deviation of the logits: an entropy of some 3 nats


def teacher_of(hidden: int, layers: int, device: torch.device) -> nn.Module:
    """A model whose logits spread as those of a trained one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight, std=SPREAD / hidden**0.5)
    return nn.Module.to(model, device)


def said(teacher: ModelTeacher, side: Side, autocast: bool) -> Tensor:
    """The teacher's logits, asked as a trainer does."""
    with torch.autocast(side.predicts.device.type, torch.bfloat16, enabled=autocast):
        return teacher.signal(nn.Identity(), side).dense()


def seconds(runs: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> None:
    """Print a line of each: seconds, share of the first, and nats from the first."""
    exact = {name: run().float() for name, run in runs.items()}  # the first runs warm up, too
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in found.items()}
    first = next(iter(runs))
    print(f"{'':20}{'seconds':>10}{'ratio':>8}{'mean KL':>12}{'largest KL':>12}")
    for name, median in medians.items():
        apart = divergence(exact[name], exact[first], DivergenceSpec("forward_kl"))
        cells = f"{median:10.4f}{median / medians[first]:8.2f}"
        print(f"{name:20}{cells}{apart.mean():12.1e}{apart.max():12.1e}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 512), ("layers", 8), ("rows", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    accelerator = Accelerator()
    device = accelerator.device
    model, student = (teacher_of(options.hidden, options.layers, device) for _ in range(2))
    ids = torch.randint(0, VOCAB, (options.rows, options.length), device=device)
    side = Side({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    teachers = [ModelTeacher(m) for m in (model, copy.deepcopy(model).bfloat16())]
    for teacher in teachers:
        teacher.prepare(accelerator, student, None)
    wide, narrow = teachers
    runs: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: said(wide, side, False),
        "bfloat16 autocast": lambda: said(wide, side, True),
        "bfloat16 weights": lambda: said(narrow, side, False),
    }
    print(f"{device}, {torch.get_num_threads()} threads, {options}")
    seconds(runs, options.repeats, device)


if __name__ == "__main__":
    main()
