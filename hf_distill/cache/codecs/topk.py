"""The head and the mass of the rest."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_distill.cache.codecs.sparse import SparseCodec


@dataclass(frozen=True)
class TopK(SparseCodec):
    """Stores the most probable entries and the tail's mass, which the loss sees as one category.

    What the teacher says within the tail is lost. The power sums carry the tail's mass, and no
    more, to the temperatures in the range.

    Args:
        top_k: the number of entries of the head, 1 to 255.
        top_p: ends the head once it holds this mass. None means that it always has top_k entries.
        num_exact: the number of log-probabilities that are stored in 16 bits. Those after them have
            8, see `packing.pack_head`.
        temperature: the temperature at which the log-probabilities are taken.
        temperature_range: the smallest and the largest temperature of a loss.

    Raises:
        ValueError: a number is out of range.
    """

    name: ClassVar[str] = "topk"

    top_k: int = 50
    top_p: float | None = None
    num_exact: int = 8
    temperature: float = 1.0
    temperature_range: tuple[float, float] = (1.0, 1.0)
    num_samples: int = field(init=False, repr=False, default=0)
    merges_draws: bool = field(init=False, repr=False, default=False)
