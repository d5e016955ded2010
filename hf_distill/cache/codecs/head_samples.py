"""The default codec: the head exactly, the tail by its mass, its sums and a few draws."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_distill.cache.codecs.sparse import SparseCodec


@dataclass(frozen=True)
class HeadSamples(SparseCodec):
    """Stores the most probable entries, and draws from the rest.

    The draws make the loss see the whole vocabulary: with them it is unbiased, and exactly zero for
    a student that says what the teacher says. The power sums and the draws carry the tail to every
    temperature in the range. A token takes about 185 bytes for a vocabulary of 150,000.

    Args:
        top_k: the number of entries of the head, at most 255.
        top_p: ends the head once it holds this mass. None means that it always has top_k entries.
        num_samples: the number of draws from the tail.
        num_exact: the number of log-probabilities that are stored in 16 bits. Those after them have
            8, see `packing.pack_head`.
        temperature: the temperature at which the log-probabilities are taken.
        temperature_range: the smallest and the largest temperature of a loss. A wide range puts the
            draws where a hot softmax has its mass, which makes the loss at 1 noisier.

    Raises:
        ValueError: a number is out of range.
    """

    name: ClassVar[str] = "head_samples"

    top_k: int = 16
    top_p: float | None = None
    num_samples: int = 32
    num_exact: int = 8
    temperature: float = 1.0
    temperature_range: tuple[float, float] = (1.0, 2.0)
    merges_draws: bool = field(init=False, repr=False, default=False)
