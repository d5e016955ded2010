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

A second table has bytes and speed for a vocabulary of 151,936, with Zipf-like teachers. Encoding is
held against the softmax of the same logits, timed in turn with it; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from convert_gguf import resolve_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.cache.codecs import Codec, Full, HeadSamples, HiddenStates, Sampled, TopK
from hf_distill.cache.codecs.selection import Selection, select, uniforms
from hf_distill.cache.codecs.sparse import SparseCodec
from hf_distill.cache.manifest import HEAD
from hf_distill.cache.stored_head import StoredHead, read_head
from metal_ops import DivergenceSpec, Head, SparseTeacher, divergence, sparse_divergence
from tests.benchmarks import timing

ROW = 128
FAR = -1e4  # the log-probability of what a scheme takes for impossible
KINDS = ("forward_kl", "jsd")
STUDENTS = {"near": 0.03, "mid": 0.10}
HIDDEN = (
    *(HiddenStates("bf16"), HiddenStates("int8"), HiddenStates("int8", rank=432)),
    *(
        HiddenStates("bf16", rank=288),
        HiddenStates("int8", rank=288),
        HiddenStates("int8", rank=144),
    ),
)
POSITION_BYTES = 4  # what the container adds to each token

Loss = Callable[[Tensor, DivergenceSpec], Tensor]


@dataclass
class Scheme:
    """Bytes a token, and the loss per token of student logits; decoded is [N, V] or None."""

    bytes_per_token: float
    loss: Loss
    decoded: Callable[[float], Tensor | None]
    serves: Callable[[DivergenceSpec], bool] = lambda spec: True


@dataclass
class Said:
    """What the teacher says: logits [N, V], hidden states [N, H] and their head; a sample [n, H].

    The sample is of other tokens.
    """

    logits: Tensor
    hidden: Tensor
    head: Tensor
    sample: Tensor


@dataclass
class Student:
    logits: Tensor
    hidden: Tensor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="a jsonl file; for the first table")
    parser.add_argument("--tables", nargs="+", default=["fidelity", "speed"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--sample", type=int, default=2048, help="tokens for hidden_states")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--only", nargs="+", help="names of schemes that contain one of these")
    parser.add_argument("--max-ratio", type=float, default=4.0, help="0: none")
    parser.add_argument("--tail", default="auto", help="how the losses read a tail with draws")
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


def read_models(args: argparse.Namespace) -> tuple[Said, dict[str, Student]]:
    """What the teacher says and the students' logits and hidden states."""
    name = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids: list[int] = []
    with open(args.text) as file:
        for line in file:
            strings = [value for value in json.loads(line).values() if isinstance(value, str)]
            ids += tokenizer("\n".join(strings))["input_ids"]
            if len(ids) >= args.tokens + args.sample:
                break
    both = torch.tensor(ids[: (args.tokens + args.sample) // ROW * ROW]).view(-1, ROW)
    rows, others = both[: args.tokens // ROW], both[args.tokens // ROW :]
    load = partial(AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32)
    model = load()
    hidden, head = hidden_and_head(model, rows)
    sample, _ = hidden_and_head(model, others)
    students = {}
    for student, share in STUDENTS.items():
        states, weight = hidden_and_head(noisy(load(), share, args.seed + 1), rows)
        students[student] = Student(states @ weight.T, states)
    return Said(hidden @ head.T, hidden, head, sample), students


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
        return sparse_divergence(
            student, at, spec, tail=args.tail, max_ratio=args.max_ratio or None
        )

    def decoded(temperature: float) -> Tensor | None:
        served = codec.serves(DivergenceSpec(temperature=temperature)) is None
        known = served and teacher.ids.shape[1] > 0
        return spread(teacher.at(temperature), logits.shape[1]) if known else None

    return Scheme(stored + POSITION_BYTES, loss, decoded, lambda spec: codec.serves(spec) is None)


def by_hidden(codec: HiddenStates, said: Said) -> Scheme:
    """Hidden states, by their round trip; the head, which is stored once, is not counted."""
    stored = StoredHead(Head(said.head), codec, said.sample)
    with TemporaryDirectory() as folder:
        stored.write(Path(folder), True, "size")
        stored.read_extra(Path(folder))
        head, sizes = read_head(Path(folder, HEAD), stored.notes(), codec, folder)
    lengths = [ROW] * (len(said.hidden) // ROW)
    rows = codec.encode(stored.stored_form(said.hidden), lengths, [(0, 0)] * len(lengths), 1)
    size = sum(array.nbytes for row in rows for array in row.values()) / len(said.hidden)
    read = codec.decode(rows, lengths, stored.width)
    read = read if sizes is None else read * sizes
    return by_log_probs(size + POSITION_BYTES, read.float() @ head.weight.T)


def by_log_probs(bytes_per_token: float, log_probs: Tensor) -> Scheme:
    """A scheme that is read as a whole distribution."""

    def decoded(temperature: float) -> Tensor:
        return (log_probs / temperature).log_softmax(-1)

    return Scheme(bytes_per_token, lambda x, spec: divergence(x, log_probs, spec), decoded)


def spread(teacher: SparseTeacher, vocab: int) -> Tensor:
    """[N, V] log-probabilities, the tail's mass evenly on its entries."""
    size = (vocab - (teacher.ids >= 0).sum(-1, keepdim=True)).log()
    dense = (teacher.log_tail[:, None] - size).expand(-1, vocab + 1).clone()
    places = teacher.ids.masked_fill(teacher.ids < 0, vocab)  # a column that is cut off
    return dense.scatter_(-1, places, teacher.log_probs)[:, :vocab]


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


def codecs() -> dict[str, Codec]:
    wide, one = (1.0, 2.0), (1.0, 1.0)
    return {
        "full fp16": Full("fp16"),
        "full int8": Full("int8"),
        "head_samples (default)": HeadSamples(),
        "head_samples, k 32, n 16, range (1, 1)": HeadSamples(
            32, num_samples=16, temperature_range=one
        ),
        "head_samples, top_p 0.95": HeadSamples(top_p=0.95),
        "topk 50": TopK(50, temperature_range=wide),
        "sampled 50, range (1, 1)": Sampled(50),
        "sampled 50": Sampled(50, temperature_range=wide),
    }


def schemes(said: Said, args: argparse.Namespace) -> Iterator[tuple[str, Scheme]]:
    """Each by its name; made when it is its turn."""
    logits = said.logits
    ids = id_bytes(logits.shape[1])
    makers: dict[str, Callable[[], Scheme]] = {
        name: partial(by_codec, codec, logits, args) for name, codec in codecs().items()
    } | {
        f"hidden_states {x.format}{'' if x.rank is None else f', rank {x.rank}'}": partial(
            by_hidden, x, said
        )
        for x in HIDDEN
    }
    makers |= {
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


def divergence_of(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def fidelity(args: argparse.Namespace) -> None:
    """The first table, one part per temperature."""
    teacher, students = read_models(args)
    specs = {
        temperature: [DivergenceSpec(kind, temperature=temperature) for kind in KINDS]
        for temperature in args.temperatures
    }
    exact = {
        (name, spec): loss_and_gradient(partial(full, teacher.logits), student, spec)
        for name, student in students.items()
        for wanted in specs.values()
        for spec in wanted
    }
    cases = [f"{kind} {name}" for kind in KINDS for name in students]
    for temperature, wanted in specs.items():
        values = [f"{exact[name, spec][0]:.4f}" for spec in wanted for name in students]
        print(f"\nTemperature {temperature:g}; losses {', '.join(cases)}: {', '.join(values)}\n")
        columns = ["scheme", "B/token", "KL", *(f"{case}: loss, error, cos" for case in cases)]
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        log_p = (teacher.logits / temperature).log_softmax(-1)
        for scheme_name, scheme in schemes(teacher, args):
            decoded = scheme.decoded(temperature)
            kl = None if decoded is None else divergence_of(log_p, decoded)
            cells = [scheme_name, f"{scheme.bytes_per_token:.0f}"]
            cells.append("-" if kl is None else f"{kl:.3f}" if kl < 50 else "inf")
            for spec in wanted:
                for name, student in students.items():
                    cells.append(compared(scheme, student, spec, exact[name, spec]))
            print("| " + " | ".join(cells) + " |", flush=True)


def full(teacher: Tensor, student: Tensor, spec: DivergenceSpec) -> Tensor:
    return divergence(student, teacher, spec)


def compared(
    scheme: Scheme, student: Student, spec: DivergenceSpec, exact: tuple[float, Tensor]
) -> str:
    """Error of the loss, of the gradient, and the gradient's cosine."""
    if not scheme.serves(spec):
        return "-"
    value, gradient = loss_and_gradient(scheme.loss, student, spec)
    error = (gradient - exact[1]).norm() / exact[1].norm()
    pair = gradient.flatten().double(), exact[1].flatten().double()
    cosine = nn.functional.cosine_similarity(*pair, dim=0)
    return f"{value / exact[0] - 1:+.1%}, {error:.3f}, {cosine:.3f}"


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls, in time of this process."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def speed(args: argparse.Namespace, vocab: int = 151_936, tokens: int = 40, times: int = 5) -> None:
    """The second table: rows of 200 tokens, batches of 40 and of 8 rows to decode."""
    generator = torch.Generator().manual_seed(args.seed)
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(tokens)])
    logits = torch.randn(tokens, vocab, generator=generator) * 0.3 - 1.5 * (ranks + 1.0).log()
    columns = ["codec", "B/token", "encode", "in softmaxes", "of it packing", "decode", "of 8 rows"]
    print(f"\nVocabulary {vocab}; tokens/s of one core\n\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for name, codec in codecs().items():
        if args.only is not None and not any(part in name for part in args.only):
            continue
        encode = partial(codec.encode, logits, [tokens], [(args.seed, 0)], vocab)
        (row,) = encode()
        cells = [f"{sum(a.nbytes for a in row.values()) / tokens + POSITION_BYTES:.0f}"]
        both = [(seconds(encode, 1), seconds(partial(logits.softmax, -1), 1)) for _ in range(7)]
        cells.append(f"{tokens / statistics.median(own for own, _ in both):.0f}")
        cells.append(f"{statistics.median(own / softmax for own, softmax in both):.1f}")
        rows, lengths = [row], [tokens]
        if not isinstance(codec, SparseCodec):
            cells.append("-")
        else:
            points = uniforms([(args.seed, 0)], [tokens])
            kept = select(logits, points, codec.plan)
            many = Selection(*(np.concatenate([x] * 100) for x in kept))
            pack = partial(codec.pack, many, [200] * 20, vocab)
            cells.append(f"{4000 / seconds(pack, 10):,.0f}")
            (long,) = codec.encode(logits.repeat(times, 1), [200], [(args.seed, 0)], vocab)
            rows, lengths = [long] * 40, [200] * 40
        for count in (len(rows), 8):
            some = partial(codec.decode, rows[:count], lengths[:count], vocab)
            cells.append(f"{sum(lengths[:count]) / seconds(some, 30):,.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    given = arguments()
    torch.set_num_threads(1)
    timing.restart(given.allocator)
    if "fidelity" in given.tables:
        fidelity(given)
    if "speed" in given.tables:
        speed(given)
