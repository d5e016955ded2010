"""What a codec is: a teacher's log-probabilities as a few arrays per row of the data.

Shapes: N scored tokens of all rows together, V vocabulary (logits per token), H hidden, n draws, K
entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from metal_ops import DivergenceSpec, SparseTeacher

Arrays = dict[str, np.ndarray]
"""What is stored of one row: 1-D arrays by name."""


class Codec(Protocol):
    """Turns logits into arrays that are stored, and stored arrays into a teacher.

    A row is the unit: encoding it gives the same bytes whatever rows it is encoded with, and any
    row can be decoded without the others.

    Attributes:
        name: under which `make_codec` knows the class.
        of_hidden: whether it stores hidden states. Then logits [N, V] and the vocabulary are, in
            what follows, hidden states [N, H] and their width; the head that makes logits of them
            lies beside the shards.
    """

    name: ClassVar[str]
    of_hidden: ClassVar[bool]

    @property
    def temperature(self) -> float:
        """Return the temperature at which the stored log-probabilities are taken."""
        ...

    @property
    def temperature_range(self) -> tuple[float, float]:
        """Return the smallest and largest temperature at which a loss may use them."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return what JSON can hold; `make_codec(name, settings)` builds the same codec again."""
        ...

    def arrays(self, vocab: int) -> dict[str, np.dtype]:
        """Return the names and dtypes of a row's arrays for a vocabulary of that many entries."""
        ...

    def serves(self, spec: DivergenceSpec) -> str | None:
        """Return why a loss cannot be computed from what is stored, and what to cache, or None."""
        ...

    def encode(
        self,
        logits: Tensor,
        /,
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        real_vocab: int,
    ) -> list[Arrays]:
        """Return the arrays of each row.

        Args:
            logits: [N, V] floating point, on any device; entries are chosen there, and only what
                is stored is moved.
            lengths: scored tokens of each row; they sum to N.
            keys: (seed, row) of each row, the only source of randomness.
            real_vocab: entries from here on are padding of the vocabulary and get no probability.

        Returns:
            One dictionary per row, with the names and dtypes of `arrays(V)`.

        Raises:
            ValueError: the arguments disagree, or a logit is NaN or a token has no finite one.
        """
        ...

    def decode(
        self, rows: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], vocab: int, /
    ) -> SparseTeacher | Tensor:
        """Return the teacher of the rows' tokens, in order, on the CPU.

        Args:
            rows: as `encode` made them; they may come from a damaged file.
            lengths: scored tokens of each row.
            vocab: V of the logits that were encoded.

        Returns:
            What is known of the N tokens, float32 and int64, at `temperature`; or, of a codec that
            stores every entry, [N, V] float32 log-probabilities; or [N, H] hidden states.

        Raises:
            ValueError: an array is missing or does not fit the lengths, or holds a value that no
                teacher has; the message says which. What is returned is safe to index with.
        """
        ...
