"""Teacher caches: `python -m tests.benchmarks.cache --text test.jsonl --allocator keep`.

What a codec costs and what training sees of the teacher through it, on SmolLM2-135M over the text
of a file (one JSON object a line, all its strings), for two students: the teacher with 3 % (near)
and 10 % (mid) noise on its weights. Per temperature: the KL from the teacher to what is decoded,
its tail spread evenly; the relative error of the loss; relative error and cosine of the gradient
of the output head's weight. The reference is the loss over the full vocabulary.

Beside the codecs stand schemes of other projects, written from their descriptions: the top k,
renormalised; raw top-k logits without their normaliser, which can only be read like that (pmetal);
four bits with one scale for the whole tensor (pmetal); the sorted log-probabilities as a few exact
ones and a polynomial (DistillKit).

A second table has bytes and speed for a vocabulary of 151,936, with Zipf-like teachers.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from convert_gguf import resolve_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.offline.codecs import Codec, Full, HeadSamples, Sampled, TopK
from metal_ops import DivergenceSpec, SparseTeacher, divergence, sparse_divergence

ROW = 128
FAR = -1e4  # the log-probability of what a scheme takes for impossible
KINDS = ("forward_kl", "jsd")
STUDENTS = {"near": 0.03, "mid": 0.10}
POSITION_BYTES = 4  # what the container adds to each token

Loss = Callable[[Tensor, DivergenceSpec], Tensor]


@dataclass
class Scheme:
    """Bytes a token, and the loss per token of student logits; decoded is [N, V] or None."""

    bytes_per_token: float
    loss: Loss
    decoded: Callable[[float], Tensor | None]


@dataclass
class Student:
    logits: Tensor
    hidden: Tensor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, help="a jsonl file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--only", nargs="+", help="names of schemes that contain one of these")
    parser.add_argument("--max-ratio", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allocator", choices=["default", "keep"], default="default")
    return parser.parse_args()


@torch.no_grad()
def hidden_and_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = [model.model(row[None]).last_hidden_state[0] for row in ids]  # pyright: ignore
    return torch.cat(hidden), model.lm_head.weight.detach()  # pyright: ignore


def noisy(model: nn.Module, share: float, seed: int) -> nn.Module:
    """The model with noise of that share of each matrix' own scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * weight.std() * share)
    return model


def read_models(args: argparse.Namespace) -> tuple[Tensor, dict[str, Student]]:
    """The teacher's logits and the students' logits and hidden states."""
    name = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids: list[int] = []
    with open(args.text) as file:
        for line in file:
            strings = [value for value in json.loads(line).values() if isinstance(value, str)]
            ids += tokenizer("\n".join(strings))["input_ids"]
            if len(ids) >= args.tokens:
                break
    rows = torch.tensor(ids[: args.tokens // ROW * ROW]).view(-1, ROW)
    load = partial(AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32)
    hidden, head = hidden_and_head(load(), rows)
    students = {}
    for student, share in STUDENTS.items():
        states, weight = hidden_and_head(noisy(load(), share, args.seed + 1), rows)
        students[student] = Student(states @ weight.T, states)
    return hidden @ head.T, students


def by_codec(codec: Codec, logits: Tensor, args: argparse.Namespace) -> Scheme:
    """A codec of ours, by its round trip."""
    lengths = [ROW] * (len(logits) // ROW)
    keys = [(args.seed, row) for row in range(len(lengths))]
    rows = codec.encode(logits, lengths, keys, logits.shape[1])
    stored = sum(array.nbytes for row in rows for array in row.values()) / len(logits)
    teacher = codec.decode(rows, lengths, logits.shape[1])
    if isinstance(teacher, Tensor):
        return by_log_probs(stored + POSITION_BYTES, teacher)

    def loss(student: Tensor, spec: DivergenceSpec) -> Tensor:
        at = teacher.at(spec.temperature)
        return sparse_divergence(student, at, spec, max_ratio=args.max_ratio or None)

    def decoded(temperature: float) -> Tensor | None:
        return spread(teacher.at(temperature), logits.shape[1]) if codec.top_k else None  # pyright: ignore

    return Scheme(stored + POSITION_BYTES, loss, decoded)


def by_log_probs(bytes_per_token: float, log_probs: Tensor) -> Scheme:
    """A scheme that is read as a whole distribution."""

    def decoded(temperature: float) -> Tensor:
        return (log_probs / temperature).log_softmax(-1)

    return Scheme(bytes_per_token, lambda x, spec: divergence(x, log_probs, spec), decoded)


def spread(teacher: SparseTeacher, vocab: int) -> Tensor:
    """[N, V] log-probabilities, the tail's mass evenly on its entries."""
    size = (vocab - (teacher.ids >= 0).sum(-1, keepdim=True)).log()
    dense = (teacher.log_tail[:, None] - size).expand(-1, vocab).clone()
    return dense.scatter_(-1, teacher.ids, teacher.log_probs)


def id_bytes(vocab: int) -> float:
    return (vocab - 1).bit_length() / 8


def renormalised(logits: Tensor, k: int, bytes_per_value: float, id_size: float) -> Scheme:
    """The top k, the rest impossible."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    dense = torch.full_like(logits, FAR).scatter_(-1, ids, values.half().float())
    return by_log_probs(k * (bytes_per_value + id_size), dense)


def four_bits(logits: Tensor) -> Scheme:
    """Raw logits in 16 levels between the smallest and the largest of the whole tensor."""
    low, high = logits.min(), logits.max()
    step = (high - low) / 15
    return by_log_probs(logits.shape[1] / 2, ((logits - low) / step).round() * step + low)


def polynomial(logits: Tensor, k: int, num_exact: int, degree: int, bucket: bool) -> Scheme:
    """The top k: the first few in float16, the others by a polynomial of their rank's log."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    place = torch.linspace(-1, 1, k - num_exact, dtype=torch.float64)
    basis = torch.stack([place**i for i in range(degree + 1)], -1)
    fitted = torch.linalg.lstsq(basis, values[:, num_exact:].double().T).solution.half().double()
    kept = torch.cat([values[:, :num_exact].half().float(), (basis @ fitted).T.float()], -1)
    size = k * id_bytes(logits.shape[1]) + 2 * (num_exact + degree + 1)
    dense = torch.full_like(logits, FAR).scatter_(-1, ids, kept)
    if bucket:
        mass = kept.exp().sum(-1).clamp_max(1 - 1e-6)
        teacher = SparseTeacher(ids, kept, (1 - mass).log())
        dense = spread(teacher, logits.shape[1])
    return by_log_probs(size, dense)


def schemes(logits: Tensor, args: argparse.Namespace) -> Iterator[tuple[str, Scheme]]:
    """Each by its name; made when it is its turn."""
    wide = (1.0, 2.0)
    codecs: dict[str, Codec] = {
        "full fp16": Full("fp16"),
        "full int8": Full("int8"),
        "head_samples (default)": HeadSamples(),
        "head_samples, range (1, 1)": HeadSamples(temperature_range=(1.0, 1.0)),
        "head_samples, top_p 0.95": HeadSamples(top_p=0.95),
        "topk 50": TopK(50, temperature_range=wide),
        "sampled 50": Sampled(50, temperature_range=wide),
    }
    ids = id_bytes(logits.shape[1])
    makers: dict[str, Callable[[], Scheme]] = {
        name: partial(by_codec, codec, logits, args) for name, codec in codecs.items()
    } | {
        "renormalised top 50 fp16": lambda: renormalised(logits, 50, 2, ids),
        "renormalised top 128 fp16": lambda: renormalised(logits, 128, 2, ids),
        "raw top 128, f32 and i32 (pmetal)": lambda: renormalised(logits, 128, 4, 4),
        "int4, one scale (pmetal)": lambda: four_bits(logits),
        "polynomial, k 50 (DistillKit)": lambda: polynomial(logits, 50, 1, 4, False),
        "polynomial, k 128 (DistillKit)": lambda: polynomial(logits, 128, 16, 8, False),
        "polynomial, k 128, bucket": lambda: polynomial(logits, 128, 16, 8, True),
    }
    for name, make in makers.items():
        if args.only is None or any(part in name for part in args.only):
            yield name, make()


def loss_and_gradient(loss: Loss, student: Student, spec: DivergenceSpec) -> tuple[float, Tensor]:
    """Mean over tokens, and the gradient of the head's weight [V, H]."""
    logits = student.logits.detach().requires_grad_()
    mean = loss(logits, spec).mean()
    mean.backward()
    assert logits.grad is not None
    return mean.item(), logits.grad.T @ student.hidden
