"""Every entry: large, and good for every loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache.codecs import packing
from hf_distill.cache.codecs.protocol import Arrays
from metal_ops import DivergenceSpec

FORMATS = ("fp16", "int8")
IMPOSSIBLE = 255  # the int8 code of an entry without probability
LEVELS = 254


@dataclass(frozen=True)
class Full:
    """Stores all log-probabilities, less the token's largest, in 16 or 8 bits.

    Less the largest, the entries that matter are near 0, where float16 is fine; logits themselves,
    around 20, would be rounded to a hundredth (bfloat16: to a tenth). "int8" divides the token's
    range evenly. A row of T tokens is `full_fp16` [T * R], or `full_int8` [T * R] and `full_scale`
    [T]: the smallest log-probability, less the largest. R is the number of real entries.

    Args:
        format: "fp16" stores 16 bits per entry, and "int8" stores 8.

    Raises:
        ValueError: format is another.
    """

    name: ClassVar[str] = "full"
    of_hidden: ClassVar[bool] = False

    format: str = "fp16"
    temperature: float = field(init=False, repr=False, default=1.0)
    temperature_range: tuple[float, float] = field(init=False, repr=False, default=(0.0, math.inf))

    def __post_init__(self) -> None:
        """Check the format."""
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {self.format!r}")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        return {"format": self.format}

    def arrays(self, vocab: int) -> dict[str, np.dtype]:
        """Return the names and dtypes of a row's arrays."""
        if self.format == "fp16":
            return {"full_fp16": np.dtype("<f2")}
        return {"full_int8": np.dtype("u1"), "full_scale": np.dtype("<f4")}

    def serves(self, spec: DivergenceSpec) -> str | None:
        """Return None: every loss can be computed."""
        return None

    @torch.no_grad()
    def encode(
        self,
        logits: Tensor,
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        real_vocab: int,
    ) -> list[Arrays]:
        """Return the arrays of each row; see `Codec.encode`. The keys are not used."""
        if logits.ndim != 2 or len(logits) != sum(lengths) or len(keys) != len(lengths):
            raise ValueError(
                f"logits must be [{sum(lengths)}, V] for {len(keys)} rows, got "
                f"{list(logits.shape)} for {len(lengths)}"
            )
        if not 0 < real_vocab <= logits.shape[1]:
            raise ValueError(f"real_vocab must be in [1, {logits.shape[1]}], got {real_vocab}")
        ends = list(accumulate(lengths))
        return [self._encode_row(logits[a:b, :real_vocab].float()) for a, b in pairwise([0, *ends])]

    def _encode_row(self, logits: Tensor) -> Arrays:
        largest = logits.amax(-1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError("logits must be finite or -inf, with a finite one in each token")
        below = logits - largest
        if self.format == "fp16":
            return {"full_fp16": packing.half(below.cpu().numpy()).reshape(-1)}
        finite = below.masked_fill(below == -torch.inf, 0.0)
        smallest = finite.amin(-1, keepdim=True)
        share = (finite / smallest.clamp_max(-1e-6)).clamp(0, 1)
        codes = (share * LEVELS).round().to(torch.uint8)
        codes.masked_fill_(below == -torch.inf, IMPOSSIBLE)
        return {
            "full_int8": codes.cpu().numpy().reshape(-1),
            "full_scale": smallest[:, 0].cpu().numpy().astype("<f4"),
        }

    def decode(
        self, rows: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], vocab: int
    ) -> Tensor:
        """Return [N, V] float32 log-probabilities of the rows' tokens; see `Codec.decode`.

        Raises:
            ValueError: an array is missing, or has a wrong size or a value that no teacher has.
        """
        if len(rows) != len(lengths):
            raise ValueError(f"there must be one length per row, {len(rows)}, got {len(lengths)}")
        result = torch.full((sum(lengths), vocab), -torch.inf)
        ends = list(accumulate(lengths))
        for row, (a, b) in zip(rows, pairwise([0, *ends]), strict=True):
            values = self._decode_row(row, b - a, vocab)
            result[a:b, : values.shape[1]] = values
        return result.log_softmax(-1)

    def _decode_row(self, row: Mapping[str, np.ndarray], length: int, vocab: int) -> Tensor:
        name = f"full_{self.format}"
        real_vocab = np.size(row.get(name, ())) // max(length, 1)
        if length and not 1 <= real_vocab <= vocab:
            raise ValueError(f"{name} must have 1 to {vocab} entries a token, got {real_vocab}")
        dtype = self.arrays(vocab)[name]
        stored = packing.join([row], name, dtype, [length * real_vocab])
        if self.format == "fp16":
            values = packing.whole(stored).view(length, -1 if length else 0)
        else:
            codes = torch.from_numpy(stored).view(length, -1 if length else 0)
            scale = torch.from_numpy(packing.join([row], "full_scale", packing.F32, [length]))[
                :, None
            ]
            if not bool(((scale <= 0) & scale.isfinite()).all()):
                raise ValueError("full_scale must be finite and at most 0")
            values = codes * (scale / LEVELS)
            values.masked_fill_(codes == IMPOSSIBLE, -torch.inf)
        if length and not bool(((values <= 0).all(-1) & (values == 0).any(-1)).all()):
            raise ValueError(f"{name} must be at most 0, and 0 at each token's largest")
        return values
