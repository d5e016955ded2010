"""Logits for tests of codecs, and what they mean, in float64."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.codecs import Codec, Full, HeadSamples, Sampled, TopK

SEED = 7


def zipf_logits(tokens: int, vocab: int, seed: int = 0, slope: tuple[float, float] = (1.1, 1.7)):
    """[tokens, vocab] float32: log-probabilities that fall with the log of the rank, and noise."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(tokens)])
    low, high = slope
    falls = low + (high - low) * torch.rand(tokens, 1, generator=generator)
    noise = torch.randn(tokens, vocab, generator=generator)
    return -falls * (ranks + 1.0).log() + 0.3 * noise


def exact(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[tokens, vocab] float64 log-probabilities."""
    return (logits.double() / temperature).log_softmax(-1)


def tail_of(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[tokens, vocab]: -inf at the ids that are not negative."""
    known = torch.zeros_like(log_probs, dtype=torch.bool)
    for row, token in zip(known, ids, strict=True):
        row[token[token >= 0]] = True
    return log_probs.masked_fill(known, -torch.inf)


def encode(codec: Codec, logits: Tensor, lengths: Sequence[int], real_vocab: int | None = None):
    keys = [(SEED, row) for row in range(len(lengths))]
    return codec.encode(logits, lengths, keys, real_vocab or logits.shape[1])


def num_bytes(rows: Sequence[Mapping[str, np.ndarray]]) -> int:
    return sum(array.nbytes for row in rows for array in row.values())


def same(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Equal names, dtypes and bytes."""
    if [list(row) for row in a] != [list(row) for row in b]:
        return False
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x]
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


CODECS: dict[str, Codec] = {
    "head_samples": HeadSamples(),
    "nucleus": HeadSamples(top_k=24, top_p=0.8),
    "one temperature": HeadSamples(temperature_range=(1.0, 1.0)),
    "topk": TopK(),
    "topk, warm": TopK(20, top_p=0.9, temperature_range=(0.8, 2.0)),
    "sampled": Sampled(),
    "sampled, warm": Sampled(20, temperature_range=(1.0, 2.0)),
    "fp16": Full("fp16"),
    "int8": Full("int8"),
}
SPARSE = {name: codec for name, codec in CODECS.items() if not isinstance(codec, Full)}
"""Those that decode to a SparseTeacher."""
